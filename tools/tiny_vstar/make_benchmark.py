"""Draws the benchmark `tiny_vstar`: `python -m tools.tiny_vstar.make_benchmark --out FILE.parquet`.

`--scenes-seed 7` draws one on scenes that nobody has seen instead, for `SDRPN_DATA`.

Like V*, it asks mostly about what the first look cannot resolve: about 78 % of the discs are fine.
Every scene has 5 or 6 discs and every disc is asked about. The scenes' seed is no training seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Sequence, Value, load_dataset
from pyarrow import parquet
from tqdm import tqdm

from sdrpn.io.atomic import as_json
from tools.tiny_vstar import scenes as sc

BENCHMARK_SEED = (20260, 99)
FRESH_SEED = 20261
"""First number of the seed of fresh scenes; no benchmark, tuning or training scene has it."""
IMAGES = 125
FINE_SHARE = 0.78
QUALITY = 92
FEATURES = Features(
    {
        "question_id": Value("string"),
        "image_id": Value("string"),
        "image": Image(),
        "width": Value("int32"),
        "height": Value("int32"),
        "question": Value("string"),
        "answer": Value("string"),
        "colour": Value("string"),
        "category": Value("string"),
        "box": Sequence(Value("int32"), length=4),
    }
)


def scene_rows(scene: sc.Scene, image_id: str, quality: int = QUALITY) -> list[dict[str, Any]]:
    """One row per disc. `box` is the disc's (x0, y0, x1, y1), half-open, in pixels of the image."""
    image = {"bytes": sc.webp_bytes(scene.image, quality), "path": f"{image_id}.webp"}
    height, width = scene.image.shape[:2]
    return [
        {
            "question_id": f"{image_id}-{disc.colour}",
            "image_id": image_id,
            "image": image,
            "width": width,
            "height": height,
            "question": disc.question,
            "answer": disc.pattern,
            "colour": disc.colour,
            "category": "fine" if disc.fine else "coarse",
            "box": list(disc.box),
        }
        for disc in scene.discs
    ]


def benchmark_rows(
    images: int = IMAGES, seed: tuple[int, ...] = BENCHMARK_SEED
) -> list[dict[str, Any]]:
    """Rows of `images` scenes with 5 or 6 discs each."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    with tqdm(total=images, desc="scenes") as bar:
        while bar.n < images:
            scene = sc.make_scene(rng, FINE_SHARE)
            if len(scene.discs) >= 5:
                rows.extend(scene_rows(scene, f"scene_{bar.n:03d}"))
                bar.update()
    return rows


def fresh_rows(seeds: Iterable[int], images: int = IMAGES) -> list[dict[str, Any]]:
    """Rows of `images` new scenes per seed, drawn as those of the benchmark are."""
    return [
        row | {"seed": seed} | {name: f"{seed}/{row[name]}" for name in ("question_id", "image_id")}
        for seed in seeds
        for row in benchmark_rows(images, (FRESH_SEED, seed))
    ]


def write(rows: list[dict[str, Any]], out: Path, features: Features = FEATURES) -> None:
    """Write the rows as parquet; the dictionary stores a picture once for all of its questions."""
    out.parent.mkdir(parents=True, exist_ok=True)
    table: Any = Dataset.from_list(rows, features=features).with_format("arrow")[:]
    table = table.replace_schema_metadata(features.arrow_schema.metadata)
    parquet.write_table(
        table, out, compression="zstd", use_dictionary=True, dictionary_pagesize_limit=2**24
    )


def main() -> None:
    """Write the file, read it back and print what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="parquet file to write")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"scenes (default: {IMAGES})")
    parser.add_argument("--scenes-seed", type=int, nargs="+", help="draw --images scenes of each")
    args = parser.parse_args()
    if args.scenes_seed:
        rows = fresh_rows(args.scenes_seed, args.images)
        write([{name: row[name] for name in FEATURES} for row in rows], args.out)
    else:
        write(benchmark_rows(args.images), args.out)
    back = load_dataset("parquet", data_files={"test": str(args.out)}, split="test")
    fine = sum(category == "fine" for category in back["category"])
    facts = {
        "questions": len(back),
        "images": len(set(back["image_id"])),
        "fine": fine,
        "fine_share": round(fine / len(back), 3),
        "megabytes": round(args.out.stat().st_size / 1e6, 2),
        "first_image": str(back[0]["image"].size),
    }
    print(as_json(facts, indent=2))


if __name__ == "__main__":
    main()
