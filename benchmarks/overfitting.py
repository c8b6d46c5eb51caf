"""Does training learn, and does the picture matter? Eight triplets, small components of the real classes.

python benchmarks/overfitting.py --train unet --output build
python benchmarks/overfitting.py --train unet --family audioldm2 --steps 300 --output build
python benchmarks/overfitting.py --train lora --steps 400 --output build

Prints the loss on fixed timesteps and noise before and after, with the pictures shuffled and at alpha = 0, as paired
differences with 95% intervals, and draws the curves. `--train lora` first trains the music UNet on other clips, as a
public one is trained, then from there once all of it and once a LoRA of rank 8, and says the share of the gain it has.
"""

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from melfusion_pipeline import MelFusionPipeline, VisualSynapse
from melfusion_pipeline.adapters_melfusion import LORA_TARGETS, add_lora
from melfusion_pipeline.audio import waveform_to_latents
from melfusion_pipeline.caches import TrajectoryCache
from melfusion_pipeline.metrics import bootstrap_interval
from melfusion_pipeline.training import MelFusionObjective, freeze

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from untrained import FAMILIES, untrained_components  # noqa: E402

TRIPLETS = 8
DRAWS = 32
# Short clips: what a picture can tell shows where noise hides which clip it is, and in many dimensions it seldom does.
SAMPLES = 2 * 640
COPIES = 4
# What is trained: steps, and learning rates by part. Alone, the synapse gains from a lower rate and more steps.
UNET = {"steps": 1500, "rates": {"synapse": 1e-2, "unet": 2e-3}}
SYNAPSE = {"steps": 4000, "rates": {"synapse": 5e-3}}
LORA = {"steps": 1500, "rates": {"synapse": 1e-2, "lora": 1e-2}}
MAJOR, MINOR = (0, 4, 7), (0, 3, 7)


def make_triplets(chord: tuple[int, ...] = MAJOR) -> dict:
    """Eight photographs, each with a chord on a root of its own; the captions say nothing of which is which."""
    paths = sorted((ROOT / "examples" / "images").glob("*.jpg"))[:TRIPLETS]
    times = np.arange(SAMPLES) / 16000
    chords = [[220 * 2 ** ((3 * index + step) / 12) for step in chord] for index in range(len(paths))]
    waveforms = [sum(np.sin(2 * np.pi * note * times) for note in chord) * 0.15 for chord in chords]
    # Each several times in a batch, with its own timestep and noise.
    return {
        "waveforms": torch.tensor(np.stack(waveforms), dtype=torch.float32).repeat(COPIES, 1),
        "captions": ["music"] * len(paths) * COPIES,
        "indices": torch.arange(len(paths) * COPIES),
        "image_files": [str(path) for path in paths] * COPIES,
    }


def make_pipeline(triplets: dict, family: str) -> MelFusionPipeline:
    components = untrained_components(mel_bands=64, latent_frames=16, family=family)
    size = {"block_out_channels": (32, 48, 64, 64), "attention_head_dim": 8}
    if family == "audioldm":
        size["cross_attention_dim"] = size["block_out_channels"]
    components["unet"] = FAMILIES[family][0](**size)
    components["synapse"] = VisualSynapse.from_unets(components["image_unet"], components["unet"])
    pipe = MelFusionPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        # A trained VAE's posterior is narrow, a random one's so wide that it drowns the clip.
        pipe.vae.quant_conv.weight[pipe.vae.config.latent_channels :] = 0
        pipe.vae.quant_conv.bias[pipe.vae.config.latent_channels :] = -20
        latents = waveform_to_latents(triplets["waveforms"][:, None], 16000, pipe.vae)
    # A random VAE says little of its input: scaled by what differs between the clips, its latents tell them apart.
    scale = (latents - latents.mean(dim=0)).std().item()
    pipe.vae.register_to_config(scaling_factor=pipe.vae.config.scaling_factor / scale)
    return pipe


@torch.no_grad()
def fixed_losses(objective: MelFusionObjective, triplets: dict) -> np.ndarray:
    """Each row's loss on each of the fixed draws, `[draws, rows]`."""
    objective.eval()
    losses = [objective.per_sample_loss(triplets, 10**6 + draw).cpu().numpy() for draw in range(DRAWS)]
    objective.train()
    return np.stack(losses)


def train(objective: MelFusionObjective, triplets: dict, steps: int, rates: dict) -> list[tuple[int, float]]:
    """Trains and gives the curve of the loss on fixed draws."""
    groups = [{"params": list(part.parameters()), "lr": rates[name]} for name, part in objective.trained.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    curve = [(0, fixed_losses(objective, triplets).mean())]
    for step in range(steps):
        optimizer.zero_grad()
        objective(triplets, step).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % (steps // 20) == 0:
            curve.append((step + 1, fixed_losses(objective, triplets).mean()))
    return curve


def report(name: str, losses: np.ndarray, reference: np.ndarray) -> None:
    """Prints the mean of paired differences, resampled by draw."""
    low, high = bootstrap_interval((losses - reference).mean(axis=1))[1:]
    change = 100 * (losses.mean() / reference.mean() - 1)
    figures = f"{reference.mean():.5f} -> {losses.mean():.5f} ({change:+.1f}%)"
    print(f"{name}: {figures}, difference [{low:.2e}, {high:.2e}]", flush=True)


def compare(objective: MelFusionObjective, triplets: dict, name: str) -> None:
    """Reports what shuffled pictures and alpha = 0 cost."""
    losses = fixed_losses(objective, triplets)
    rolled = triplets["image_files"][1:] + triplets["image_files"][:1]
    report(f"{name}, pictures shuffled", fixed_losses(objective, {**triplets, "image_files": rolled}), losses)
    alphas = objective.pipe.synapse.alphas.detach().clone()
    with torch.no_grad():
        objective.pipe.synapse.alphas.zero_()
        report(f"{name}, against alpha = 0", losses, fixed_losses(objective, triplets))
        objective.pipe.synapse.alphas.copy_(alphas)
    print(f"{name}, alphas: {[round(alpha, 3) for alpha in alphas.tolist()]}")


def run(
    name: str,
    pipe: MelFusionPipeline,
    trainable: str,
    triplets: dict,
    folder: Path,
    image_dropout: float,
    steps: int | None,
    lora_rate: float | None = None,
) -> list[tuple[int, float]]:
    """Trains one model and reports what it learnt; returns the curve."""
    settings = {"unet": UNET, "lora": LORA, "synapse": SYNAPSE}[trainable]
    settings = {**settings, "steps": steps or settings["steps"]}
    if lora_rate is not None:
        settings["rates"] = settings["rates"] | {"lora": lora_rate}
    freeze(pipe, trainable)
    trajectories = TrajectoryCache(folder / "trajectories", pipe, 10, 32)
    dropout = {"text_dropout": 0.0, "image_dropout": image_dropout}
    objective = MelFusionObjective(pipe, trainable, trajectories, **dropout).train()
    with objective.attached():
        before = fixed_losses(objective, triplets)
        curve = train(objective, triplets, **settings)
        report(f"{name}, training", fixed_losses(objective, triplets), before)
        compare(objective, triplets, name)
    return curve


def run_lora(
    pipe: MelFusionPipeline,
    triplets: dict,
    folder: Path,
    steps: int | None,
    targets: list[str],
    lora_rate: float | None,
) -> dict[str, list]:
    """Trains a music UNet on other clips, then from there all of it and a LoRA; returns the curves of both."""
    run("other clips, text only", pipe, "unet", make_triplets(MINOR), folder, image_dropout=1.0, steps=steps)
    weights, curves = copy.deepcopy(pipe.unet.state_dict()), {}
    for trainable in ("unet", "lora"):
        pipe.unet.load_state_dict(weights)
        pipe.synapse.reset_parameters()
        if trainable == "lora":
            add_lora(pipe.unet, rank=8, targets=targets)
        curve = run(trainable, pipe, trainable, triplets, folder, image_dropout=0.1, steps=steps, lora_rate=lora_rate)
        curves[f"--train {trainable}"] = curve
    gains = {name: curve[0][1] - curve[-1][1] for name, curve in curves.items()}
    print(f"the LoRA has {gains['--train lora'] / gains['--train unet']:.1%} of the gain", flush=True)
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", choices=("unet", "lora", "synapse"), required=True)
    parser.add_argument("--family", choices=tuple(FAMILIES), default="audioldm", help="of the music model")
    parser.add_argument("--steps", type=int, help="instead of 1,500 (with the music UNet), 4,000 (synapse alone)")
    parser.add_argument(
        "--lora_targets", nargs="+", default=LORA_TARGETS, help="ends of the names of the LoRA's layers"
    )
    parser.add_argument("--output", type=Path, default=Path("build"))
    parser.add_argument("--lora_rate", type=float, help="learning rate of the LoRA, instead of 1e-2")
    args = parser.parse_args()
    triplets = make_triplets()
    pipe = make_pipeline(triplets, args.family)
    if args.train == "unet":
        curves = {
            "--train unet": run("unet", pipe, "unet", triplets, args.output, image_dropout=0.1, steps=args.steps)
        }
    elif args.train == "lora":
        curves = run_lora(pipe, triplets, args.output, args.steps, args.lora_targets, args.lora_rate)
    else:
        curves = {
            "music UNet, text only": run(
                "text only", pipe, "unet", triplets, args.output, image_dropout=1.0, steps=args.steps
            )
        }
        pipe.synapse.reset_parameters()
        curves["then --train synapse"] = run(
            "synapse", pipe, "synapse", triplets, args.output, image_dropout=0.0, steps=args.steps
        )
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(*zip(*curve), marker=".", label=name)
    axes.set(xlabel="step", ylabel="loss on fixed timesteps and noise", ylim=(0, None))
    axes.legend()
    path = args.output / f"overfitting_{args.train}.png"
    figure.savefig(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
