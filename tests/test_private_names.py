"""What is touched of other libraries beyond what they document, each by name.

After an upgrade this says first what moved, who uses it and what stops working. A private name that
the code touches and this list lacks is an error too.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdrpn.backbones.cache import GrowingLayer, cache_argument, cache_of
from sdrpn.backbones.llava15 import Llava15
from sdrpn.engine import ZoomModel
from sdrpn.inference.generation import generate
from tests.conftest import QUESTIONS, make_image
from tests.helpers.local_benchmarks import manager

ROOT = Path(__file__).parents[1]
CODE = ("sdrpn", "sdrpn_eval", "tasks", "benchmarks")


@dataclass(frozen=True)
class Touched:
    """A name, the files that touch it, what breaks without it, and whether it is as we take it.

    check: is given a tiny Llava15 and a task of lmms-eval with its requests.
    """

    name: str
    files: tuple[str, ...]
    breaks: str
    check: Callable[[Llava15, Any], Any]


def of(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def has(thing: Any, *names: str) -> bool:
    missing = [name for name in names if not hasattr(thing, name)]
    assert not missing, f"{type(thing).__name__} has no {', '.join(missing)}"
    return True


# --- transformers ------------------------------------------------------------------------------


def attention_backend(llava: Llava15, _: Any) -> bool:
    """Set on a shared config and read by layers when they run, as RPN.attach relies on."""
    config = of("transformers", "LlamaConfig")(
        hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1
    )
    config._attn_implementation = "eager"
    layer = of("transformers.models.llama.modeling_llama", "LlamaDecoderLayer")(config, 0)
    assert layer.self_attn.config is config
    return llava.text_config._attn_implementation in ("sdpa", "eager")


def offload_hook(*_: Any) -> bool:
    layer: Any = torch.nn.Linear(2, 2)
    of("accelerate", "cpu_offload")(layer, execution_device=torch.device("cpu"))
    hooks = getattr(layer._hf_hook, "hooks", (layer._hf_hook,))
    devices = {getattr(hook, "execution_device", None) for hook in hooks}
    return layer.weight.is_meta and torch.device("cpu") in devices


def decoder_layer(llava: Llava15, _: Any) -> bool:
    layer: Any = llava.layers[0][1]
    wanted = {"hidden_states", "attention_mask", "position_ids", "use_cache"}
    assert wanted | {"position_embeddings"} <= parameters(type(layer).forward)
    assert parameters(type(layer).forward) & {"cache", "past_key_values"}
    has(layer.self_attn, "q_proj", "k_proj", "v_proj", "head_dim", "scaling", "layer_idx")
    return has(layer, "input_layernorm", "self_attn")


def causal_mask(*_: Any) -> bool:
    taken = parameters(of("transformers.masking_utils", "create_causal_mask"))
    return {"config", "inputs_embeds", "attention_mask", "position_ids"} <= taken


def cache_layers(*_: Any) -> bool:
    """A cache never writes to what it began with, and takes our kind of layer."""
    empty = cache_of([])
    empty.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 1)
    assert [type(layer) for layer in empty.layers] == [GrowingLayer, GrowingLayer]
    keys, values = torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    cache = cache_of([(keys, values)])
    cache.update(torch.full((1, 2, 1, 4), 5.0), torch.zeros(1, 2, 1, 4), 0)
    layer: Any = cache.layers[0]
    assert layer.keys.shape[2] == layer.values.shape[2] == 4
    assert keys.shape[2] == 3
    assert bool((keys == 1).all())
    cache.batch_repeat_interleave(2)
    return layer.keys.shape[0] == 2


def behind_the_cache(llava: Llava15, _: Any) -> bool:
    """generate() embeds nothing itself and runs only what the cache does not hold."""
    zoom = ZoomModel(llava, proposer="none", prefix_cache=0)
    (prefix,) = zoom.prefill([make_image(112, 112, 0)])
    words = tuple(llava.prompt_ids(QUESTIONS[0]).after)
    widths: list[int] = []
    first: Any = llava.layers[0][1]
    hook = first.input_layernorm.register_forward_hook(
        lambda _, inputs, __: widths.append(inputs[0].shape[1])
    )
    try:
        suffix = llava.suffix_segment(prefix.next_position, words)
        generate(llava, [prefix], [suffix], {"max_new_tokens": 2, "min_new_tokens": 2})
    finally:
        hook.remove()
    return widths == [len(words), 1]


def submodules(llava: Llava15, _: Any) -> bool:
    has(llava.model, "lm_head", "get_image_features")
    has(llava.model.model, "vision_tower", "multi_modal_projector", "language_model")
    return has(llava.model.model.language_model, "layers", "norm", "rotary_emb", "embed_tokens")


def image_features(llava: Llava15, _: Any) -> bool:
    pixels = torch.zeros(2, 3, llava.side, llava.side)
    return has(llava.model.get_image_features(pixel_values=pixels), "pooler_output")


def checkpointing(llava: Llava15, _: Any) -> bool:
    layer: Any = llava.layers[0][1]
    assert "_gradient_checkpointing_func" in inspect.getsource(
        of("transformers.modeling_layers", "GradientCheckpointingLayer")
    )
    assert isinstance(layer, of("transformers.modeling_layers", "GradientCheckpointingLayer"))
    return has(layer, "gradient_checkpointing")


def trainer_files(*_: Any) -> bool:
    state = of("transformers.trainer_callback", "TrainerState")
    assert of("transformers.trainer", "TRAINER_STATE_NAME") == "trainer_state.json"
    has(state(), "global_step", "max_steps", "best_model_checkpoint", "log_history")
    return has(state, "load_from_json")


# --- lmms-eval ---------------------------------------------------------------------------------


def index_entries(_: Llava15, asked: Any) -> bool:
    entry = asked.index["textvqa_val"]
    assert asked.index["textvqa"]["type"] in ("group", "tag")
    assert entry["type"] == "task"
    config = of("lmms_eval.utils", "load_yaml_config")(entry["yaml_path"], mode="simple")
    return bool(config["task"] == "textvqa_val" and config["metric_list"])


def request_tuple(_: Llava15, asked: Any) -> bool:
    prompt, settings, visual, doc_id, task, split = asked.requests[0].args
    assert isinstance(prompt, str)
    assert isinstance(settings, dict)
    assert (doc_id, task, split) == (0, "tiny_vstar", "test")
    return visual.__self__ is asked.task


def padding(_: Llava15, asked: Any) -> bool:
    clone = of("lmms_eval.evaluator", "_clone_padding_request")(asked.requests[0])
    return clone.metadata["__padding_only__"] is True


def pairs_become_text(*_: Any) -> bool:
    """The two reasons for LossAndGreedy; where they are gone it can be a plain pair."""
    unwrap = of("lmms_eval.api.instance", "unwrap_generation_output")
    result = of("lmms_eval.api.instance", "GenerationResult")
    assert isinstance(unwrap((0.5, True))[0], str)
    return unwrap(result((0.5, True)))[0] == (0.5, True)


def base_model(*_: Any) -> bool:
    base = of("lmms_eval.api.model", "lmms")
    has(base, "is_simple", "rank", "world_size", "_resolve_system_prompt")
    source = inspect.getsource(base)
    return all(name in source for name in ("self._rank", "self._world_size", "self.task_dict"))


def task_parts(_: Llava15, asked: Any) -> bool:
    has(asked.task, "_metric_fn_list", "aggregation", "eval_docs_no_media", "config", "dataset")
    return has(
        asked.task.config, "process_results", "doc_to_target", "doc_to_choice", "metric_list"
    )


def evaluator_settings(*_: Any) -> bool:
    taken = parameters(of("lmms_eval.evaluator", "simple_evaluate"))
    wanted = {"model", "tasks", "model_args", "gen_kwargs", "limit", "offset", "repeats"}
    return wanted | {"cli_args", "task_manager", "datetime_str", "bootstrap_iters"} <= taken


# --- others ------------------------------------------------------------------------------------


def dataset_of_table(*_: Any) -> bool:
    dataset = of("datasets", "Dataset")
    table = of("pyarrow", "table")({"a": [1, 2]})
    assert dataset.from_list([{"a": 1}]).with_format("arrow")[:].schema == table.schema
    return list(dataset(table)["a"]) == [1, 2]


BASE, CACHE = "sdrpn/backbones/base.py", "sdrpn/backbones/cache.py"
LLAVA = "sdrpn/backbones/llava15.py"
LLAMA = "transformers.models.llama.modeling_llama"
QWEN, QWEN_MODEL = (
    "sdrpn/backbones/qwen25_vl.py",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
)
PLUGIN, MODEL = "sdrpn_eval/plugin.py", "sdrpn_eval/model.py"

TOUCHED = (
    Touched(
        "_hf_hook",
        ("sdrpn/io/checkpoints.py",),
        "inputs would be sent to the meta device where weights are offloaded",
        offload_hook,
    ),
    Touched(
        "_attn_implementation",
        ("sdrpn/rpn/checkpoint.py", "benchmarks/workload.py"),
        "the RPN would run on another attention backend than its backbone",
        attention_backend,
    ),
    Touched(
        "_name_or_path",
        (LLAVA, QWEN),
        "a model made in memory would have no name in messages and configs",
        lambda llava, _: has(llava.model.config, "_name_or_path"),
    ),
    Touched(
        "LlamaDecoderLayer",
        (CACHE, LLAVA),
        "layers cannot be run one by one: no prefix, no RPN",
        decoder_layer,
    ),
    Touched(
        "apply_rotary_pos_emb",
        (BASE,),
        "cached keys and attention rows would lack their positions",
        lambda *_: {"q", "k", "cos", "sin"} <= parameters(of(LLAMA, "apply_rotary_pos_emb")),
    ),
    Touched("create_causal_mask", (BASE,), "no attention mask over a prefix", causal_mask),
    Touched(
        "DynamicLayer",
        (CACHE,),
        "a prefix cannot be used again without copying it, or answers would write into it",
        cache_layers,
    ),
    Touched(
        "inputs_embeds",
        (LLAVA, QWEN),
        "generate() would read the whole prompt again, or the wrong part of it",
        behind_the_cache,
    ),
    Touched(
        "language_model", (LLAVA, QWEN), "nothing of the model could be run by itself", submodules
    ),
    Touched("pooler_output", (LLAVA, QWEN), "image tokens would be something else", image_features),
    Touched(
        "Qwen2_5_VLDecoderLayer",
        (QWEN,),
        "no RPN for Qwen2.5-VL",
        lambda *_: (
            {"hidden_states", "attention_mask", "position_embeddings"}
            <= parameters(of(QWEN_MODEL, "Qwen2_5_VLDecoderLayer").forward)
        ),
    ),
    Touched(
        "recomposition_frequencies",
        (QWEN,),
        "rotary embeddings of three axes would have to be joined by the layers",
        lambda *_: has(of(QWEN_MODEL, "Qwen2_5_VLRotaryEmbedding"), "recomposition_frequencies"),
    ),
    Touched(
        "get_vision_position_ids",
        (QWEN,),
        "pictures would have no positions",
        lambda *_: (
            {"start_position", "grid_thw", "spatial_merge_size", "device"}
            <= parameters(of(QWEN_MODEL, "Qwen2_5_VLModel").get_vision_position_ids)
        ),
    ),
    Touched(
        "mm_token_type_ids",
        (QWEN,),
        "prompts with several pictures would have the positions of text",
        lambda *_: (
            "mm_token_type_ids"
            in parameters(of(QWEN_MODEL, "Qwen2_5_VLForConditionalGeneration").forward)
        ),
    ),
    Touched(
        "smart_resize",
        ("sdrpn/backbones/qwen25_vl_images.py",),
        "grids would not be those that the image processor makes",
        lambda *_: (
            of("transformers.models.qwen2_vl.image_processing_qwen2_vl", "smart_resize")(
                480, 640, 28, 144 * 784, 144 * 784
            )
            == (280, 364)
        ),
    ),
    Touched(
        "LlavaImageProcessorPil",
        (LLAVA,),
        "images would not be padded to a square as LLaVA-1.5 was trained",
        lambda llava, _: llava.pixels([make_image(50, 20, 0)]).shape[-2:] == (llava.side,) * 2,
    ),
    Touched(
        "_gradient_checkpointing_func",
        ("sdrpn/distill/trainer.py",),
        "training would keep every activation in memory, without a word",
        checkpointing,
    ),
    Touched(
        "trainer_state.json",
        ("sdrpn/distill/trainer.py",),
        "a finished training would be taken for an unfinished one, or a cut-off one for whole",
        trainer_files,
    ),
    Touched(
        "_save_pretrained",
        ("sdrpn/rpn/checkpoint.py",),
        "save_pretrained would write no weights",
        lambda *_: has(of("huggingface_hub", "ModelHubMixin"), "_save_pretrained"),
    ),
    Touched(
        "generate_model_card",
        ("sdrpn/rpn/checkpoint.py",),
        "a saved RPN would have a card that says nothing",
        lambda *_: has(of("huggingface_hub", "ModelHubMixin"), "generate_model_card"),
    ),
    Touched(
        "initialize_tasks",
        (PLUGIN,),
        "our tasks are found with --include_path only, and SDRPN_DATA does nothing",
        lambda *_: (
            "include_path" in parameters(of("lmms_eval.tasks", "TaskManager").initialize_tasks)
        ),
    ),
    Touched(
        "ModelManifest",
        (PLUGIN,),
        "lmms-eval does not know llava_sdrpn",
        lambda *_: of("lmms_eval.models.registry_v2", "ModelManifest")("a", "b.C").model_id == "a",
    ),
    Touched(
        "yaml_path",
        ("sdrpn_eval/local_data.py", "sdrpn_eval/tasks_info.py"),
        "SDRPN_DATA, and the line that says which tasks will have a score",
        index_entries,
    ),
    Touched(
        "__self__",
        ("sdrpn_eval/requests.py",),
        "no record beside lmms-eval's output, no scorer fingerprint: a model is told neither",
        request_tuple,
    ),
    Touched(
        "output_path",
        (MODEL,),
        "no record beside lmms-eval's output",
        lambda *_: "output_path" in inspect.getsource(import_module("lmms_eval.__main__")),
    ),
    Touched(
        "lmms_eval.evaluator",
        ("sdrpn_eval/command_line.py",),
        "unsupported settings are refused only where the command line has them, and a run is told "
        "from others in its folder by time instead of by its date",
        lambda *_: (
            {
                *(
                    "system_instruction",
                    "apply_chat_template",
                    "num_fewshot",
                    "fewshot_as_multiturn",
                ),
                *("cache_requests", "use_cache", "limit", "cli_args", "datetime_str"),
            }
            <= parameters(of("lmms_eval.evaluator", "simple_evaluate"))
        ),
    ),
    Touched(
        "__padding_only__",
        ("sdrpn_eval/requests.py",),
        "with several processes, questions asked twice would be recorded twice",
        padding,
    ),
    Touched(
        "GenerationResult",
        (MODEL,),
        "losses of multiple-choice tasks",
        pairs_become_text,
    ),
    Touched(
        "_rank",
        (MODEL,),
        "several processes would all do all the work, or the wrong part",
        base_model,
    ),
    Touched(
        "_metric_fn_list",
        ("sdrpn_eval/provenance/fingerprints.py",),
        "a changed scorer would go unnoticed in comparisons",
        task_parts,
    ),
    Touched(
        "vstar_doc_to_text",
        ("tasks/vstar/utils.py",),
        "the V* tasks",
        lambda *_: has(
            import_module("lmms_eval.tasks.vstar_bench.utils"),
            "vstar_doc_to_text",
            "vstar_doc_to_visual",
        ),
    ),
    Touched(
        "simple_evaluate",
        ("sdrpn_eval/results/evaluate.py",),
        "sdrpn-eval score and replay, which ask lmms-eval's evaluator again",
        evaluator_settings,
    ),
    Touched(
        "EvaluationTracker",
        ("sdrpn_eval/results/rescore.py",),
        "sdrpn-eval score could not write its results as lmms-eval does",
        lambda *_: has(
            of("lmms_eval.loggers", "EvaluationTracker"),
            "save_results_aggregated",
            "save_results_samples",
        ),
    ),
    Touched("Dataset", ("sdrpn/distill/label_dataset.py",), "labels on disk", dataset_of_table),
    Touched(
        "_scaled_dot_product_flash_attention_for_cpu",
        ("benchmarks/flops.py",),
        "operations of fused attention on a CPU would not be counted",
        lambda *_: has(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"),
    ),
)


@pytest.fixture(scope="module")
def asked() -> Any:
    """One of our tasks as lmms-eval builds it, with two of its requests."""
    index = manager()
    tasks = of("lmms_eval.tasks", "get_task_dict")(["tiny_vstar"], index)
    task = tasks["tiny_vstar"]
    task.build_all_requests(limit=2, rank=0, world_size=1)
    return SimpleNamespace(index=index.task_index, task=task, requests=task.instances)


@pytest.mark.parametrize("touched", TOUCHED, ids=lambda t: t.name)
def test_it_is_as_we_take_it(touched: Touched, llava: Llava15, asked: Any) -> None:
    try:
        problem = "" if touched.check(llava, asked) else "it is not as we take it"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    files = ", ".join(touched.files)
    assert not problem, f"{touched.name}: {problem}. Touched in {files}; breaks: {touched.breaks}"


def sources() -> Iterator[tuple[str, ast.AST]]:
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def imports() -> dict[tuple[str, str], list[str]]:
    """(module, name) of all that is imported from these libraries -> the files that do."""
    found: dict[tuple[str, str], list[str]] = {}
    for file, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            if node.module.split(".")[0] in ("accelerate", "lmms_eval", "transformers"):
                for alias in node.names:
                    found.setdefault((node.module, alias.name), []).append(file)
    return found


@pytest.mark.parametrize(("place", "files"), imports().items(), ids=lambda v: ".".join(v))
def test_what_is_imported_is_there(place: tuple[str, str], files: list[str]) -> None:
    """Also inside functions, where a name that is gone shows only when they are called."""
    module, name = place
    try:
        of(module, name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{module} has no {name} ({error}); imported in {', '.join(files)}")


def test_the_cache_goes_by_one_of_its_names() -> None:
    assert set(cache_argument(None)) <= {"cache", "past_key_values"}
