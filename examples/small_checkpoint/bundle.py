"""Bundles a trained pipeline as the small checkpoint: its code as links, with model card and the data's attribution.

Weights of diffusers classes are saved in half precision, which loads as float32; transformers would load it as it is
stored, and a CPU is slow at that, so its classes are saved in float32.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import ModelMixin

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.files_melfusion import atomic_write

ROOT = Path(__file__).parents[2]
LIMIT = 60 * 2**20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder that train_melfusion.py wrote")
    parser.add_argument("--card", type=Path, required=True, help="the model card, which becomes README.md")
    parser.add_argument("--data", type=Path, default=Path("build/small/data"), help="folder that build_data.py wrote")
    parser.add_argument("--output", type=Path, default=ROOT / "checkpoints" / "small")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    pipe = MelFusionPipeline.from_pretrained(args.checkpoint)
    for component in pipe.components.values():
        if isinstance(component, ModelMixin):
            component.to(torch.float16)
    args.output.parent.mkdir(exist_ok=True)
    with atomic_write(args.output) as folder:
        pipe.save_pretrained(folder)
        for file in [folder / "model_index.json", *folder.glob("*/config.json")]:
            # Where the weights lay before is no concern of those who load them.
            content = {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}
            file.write_text(json.dumps(content, indent=2) + "\n")
        # Two folders further up lies the package itself, which a copy of its code could only contradict.
        for module in folder.rglob("*.py"):
            module.unlink()
            place = args.output.absolute() / module.parent.relative_to(folder)
            module.symlink_to(os.path.relpath(ROOT / "melfusion_pipeline" / module.name, place))
        shutil.copy(args.card, folder / "README.md")
        shutil.copy(args.data / "ATTRIBUTION.csv", folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if size > LIMIT:
            raise ValueError(f"The checkpoint has {size / 2**20:.1f} MiB, more than {LIMIT / 2**20:.0f}.")
        shutil.rmtree(args.output, ignore_errors=True)
    print(f"{args.output}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
