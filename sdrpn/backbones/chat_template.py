"""Prompt ids from a checkpoint's own chat template; special tokens in a question are plain text."""

from __future__ import annotations

from typing import Any

from sdrpn.backbones.plain_text import PlainText


class ChatPrompt:
    """Prompts of one user turn with images in front of a question.

    The template is rendered once around a placeholder. What it writes itself is encoded with its
    special tokens, a question without any: it may spell out <|im_end|> and means the letters.

    Args:
        processor: With `apply_chat_template` and a `tokenizer`.
        image_token_id: The token that stands for an image.
        system_prompt: Of the system turn.
        before_image: Text of the user turn in front of the images.
        before_question: Text between the images and the question.
        name: The model, for messages.
    """

    def __init__(
        self,
        processor: Any,
        image_token_id: int,
        *,
        system_prompt: str,
        before_image: str = "",
        before_question: str = "",
        name: str = "this model",
    ) -> None:
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._system_prompt = system_prompt
        self._before_image, self._before_question = before_image, before_question
        self._plain = PlainText(self._tokenizer, image_token_id, name)
        self._around: dict[int, tuple[list[int], list[int]]] = {}

    def ids(self, question: str, images: int, answer: str = "") -> list[int]:
        """Token ids with one image token an image, then those of `answer` as plain text."""
        before, after = self._template(images)
        asked = self._plain.ids(self._before_question + question if images else question)
        return [*before, *asked, *after, *(self._plain.ids(answer) if answer else [])]

    def _template(self, images: int) -> tuple[list[int], list[int]]:
        """What stands before and after the question of a prompt with so many images."""
        if images not in self._around:
            shown: list[dict[str, str]] = [{"type": "image"}] * images
            if images and self._before_image:
                shown.insert(0, {"type": "text", "text": self._before_image})
            turns = [
                {"role": "system", "content": [{"type": "text", "text": self._system_prompt}]},
                {"role": "user", "content": [*shown, {"type": "text", "text": self._plain.mark}]},
            ]
            text = self._processor.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
            before, after = (self._with_specials(part) for part in text.split(self._plain.mark))
            self._around[images] = before, after
        return self._around[images]

    def _with_specials(self, part: str) -> list[int]:
        return self._tokenizer(part, add_special_tokens=False)["input_ids"]
