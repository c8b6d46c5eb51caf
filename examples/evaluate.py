"""Makes and scores music for a set of pictures and captions: the paper's table, each figure with a 95% interval.

python examples/evaluate.py --checkpoint user/repo --triplets melbench/test.jsonl --output results \
    --clap_model laion/clap-htsat-unfused --clip_model openai/clip-vit-large-patch14 --classifier ast=user/repo
accelerate launch --num_processes 4 examples/evaluate.py ...    # the same table, sooner
python examples/evaluate.py --triplets ... --output ... --score musicgen=path/to/clips --audio_length_in_s 10

The same command resumes: a clip that is there is never made again. Needs the package's extra `eval`.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import soundfile
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from command_line import (
    errors_in_one_line,
    existing_file,
    existing_folder,
    new_folder,
    positive_int,
    positive_seconds,
    random_seed,
    read_lines,
)
from evaluate_scores import describe_rows, draw_results, extract, format_results, remarks, score
from evaluate_storyboards import (
    check_storyboards,
    format_boundaries,
    group_rows,
    make_parts,
    part,
    score_boundaries,
    share_work,
)
from evaluate_systems import (
    SYSTEMS,
    ImageCaptioner,
    check_clips,
    claim_folder,
    digest_components,
    find_clips,
    group_by_picture,
    name_and_path,
    replace_file,
    shuffle_pictures,
)
from listening_test import export_listening_test

from melfusion_pipeline import MelFusionPipeline, __version__, extractors
from melfusion_pipeline.audio import Spectrogram
from melfusion_pipeline.data import (
    COLUMNS,
    check_rows,
    export_triplets,
    load_rows,
    load_set,
    select_good_rows,
    set_root,
)
from melfusion_pipeline.features_melfusion import FEATURE_SOURCES

# What a call takes from its checkpoint where it is not given.
CALL = ("num_inference_steps", "num_inversion_steps", "guidance_scale", "image_guidance_scale", "image_guidance_end")
CLASSIFIERS = {
    "ast": extractors.AstExtractor,
    "panns": extractors.PannsExtractor,
    "passt": extractors.PasstExtractor,
}
EMBEDDERS = {"clap": extractors.ClapExtractor, "vggish": extractors.VggishExtractor, **CLASSIFIERS}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder or Hub id of a pipeline; not needed to score folders only")
    parser.add_argument("--triplets", type=existing_file, help="jsonl, json, csv or tsv; see melfusion_pipeline.data")
    parser.add_argument("--dataset_name", help="instead: a set on the Hub, or a folder that `datasets` reads")
    parser.add_argument("--dataset_config_name", help="one of several configurations of the set")
    parser.add_argument("--dataset_split", default="test", help="of the set")
    for column in COLUMNS:
        parser.add_argument(f"--{column}_column", default=column, help="its name in the set")
    parser.add_argument(
        "--data_root", type=existing_folder, help="holds all files of the set; default: the folder of --triplets"
    )
    parser.add_argument("--output", type=new_folder, required=True, help="folder for clips and results")
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, help="default: all for which a model is given")
    parser.add_argument("--score", nargs="*", type=name_and_path, default=[], metavar="NAME=FOLDER", help="more clips")
    parser.add_argument("--caption_model", help="folder or Hub id of an image-to-text model, for the system caption")
    use = "so many rows that follow one another become one piece, the system storyboard; boundaries are scored too"
    parser.add_argument("--storyboard_pictures", type=int, help=use)
    parser.add_argument("--seed", type=random_seed, default=0)
    parser.add_argument(
        "--audio_length_in_s", type=positive_seconds, help="of all clips; default: the checkpoint's own"
    )
    parser.add_argument(
        "--num_inference_steps", type=positive_int, help="default: the checkpoint's own, as for the next four"
    )
    parser.add_argument("--num_inversion_steps", type=positive_int)
    parser.add_argument("--feature_source", choices=FEATURE_SOURCES, help="default: as in the synapse's training")
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--image_guidance_scale", type=float, help="1: the picture does not guide")
    parser.add_argument("--image_guidance_end", type=float, help="share of the steps after which it guides no more")
    parser.add_argument("--synapse_scale", type=float, default=1.0)
    use = f"for FAD and KAD, one of {list(EMBEDDERS)}; default: --clap_model, without one a fixed log-mel embedding"
    parser.add_argument("--fad_extractor", type=name_and_path, metavar="NAME=MODEL", help=use)
    use = f"for FD and KL, one of {list(CLASSIFIERS)}"
    parser.add_argument("--classifier", type=name_and_path, metavar="NAME=MODEL", help=use)
    parser.add_argument("--clap_model", help="folder or Hub id, for CLAP and IMSM")
    parser.add_argument("--clip_model", help="folder or Hub id, for IMSM")
    parser.add_argument(
        "--imsm_captions", type=existing_file, help="file with one caption a line; default: the set's own"
    )
    parser.add_argument("--subjective", type=new_folder, help="folder to write a listening test into")
    arguments = parser.parse_args(arguments)
    if (arguments.triplets is None) == (arguments.dataset_name is None):
        parser.error("give --triplets or --dataset_name")
    if arguments.subjective and arguments.subjective.exists() and not (arguments.subjective / "key.json").is_file():
        parser.error(f"--subjective {arguments.subjective} exists and holds no listening test: give a new folder")
    return arguments


def read_rows(arguments: argparse.Namespace, accelerator: Accelerator) -> list[dict]:
    """Reads the set; one of `datasets` is written as files into the output first, which then are `--triplets`."""
    columns = {column: getattr(arguments, f"{column}_column") for column in COLUMNS}
    name, split = arguments.dataset_name, arguments.dataset_split
    if name is None:
        return list(load_rows(arguments.triplets, columns))
    with accelerator.main_process_first():
        rows = load_set(name, arguments.dataset_config_name, split, columns)
        root = arguments.data_root or set_root(name)
        arguments.triplets = export_triplets(rows, arguments.output / "triplets", root)
    arguments.data_root = arguments.triplets.parent
    return list(load_rows(arguments.triplets))


def choose_systems(arguments: argparse.Namespace) -> list[str]:
    """The systems to make, checked against the models given."""
    needed = {"caption": arguments.caption_model, "storyboard": arguments.storyboard_pictures}
    possible = [name for name in SYSTEMS if arguments.checkpoint and needed.get(name, True)]
    systems = possible if arguments.systems is None else list(dict.fromkeys(arguments.systems))
    impossible = sorted(set(systems) - set(possible))
    if impossible:
        raise ValueError(
            f"{impossible} cannot be made: give `--checkpoint`, and `--caption_model` for caption or"
            " `--storyboard_pictures` for storyboard."
        )
    names = systems + [name for name, _ in arguments.score]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"There must be systems to score, each with a name of its own, but they are {names}.")
    return systems


def check_counts(rows: Sequence[dict]) -> None:
    """Refuses a set that is too small for intervals, which leave one picture's rows out at a time."""
    counts = Counter(row["image"] for row in rows)
    if len(counts) < 3 or len(rows) - max(counts.values()) < 4:
        found = f"{len(rows)} rows with {len(counts)} pictures"
        raise ValueError(f"The set has {found}: give at least 5 rows, 3 pictures, and 4 rows without any one picture.")


def check_set(arguments: argparse.Namespace, rows: Sequence[dict], seconds: float) -> None:
    """Refuses a set with bad rows or too few, and folders to score that do not fit it, before anything is made."""
    select_good_rows(rows, check_rows(rows, arguments.data_root or arguments.triplets.parent, seconds))
    check_counts(rows)
    if arguments.storyboard_pictures is not None:
        check_storyboards(group_rows(rows, arguments.storyboard_pictures))
    for _, folder in arguments.score:
        check_clips(find_clips(Path(folder), rows), seconds)


def load_extractors(arguments: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Loads `clap`, `clip` and `classifier` where given, and `fad`."""
    loaded = {}
    if arguments.clap_model:
        loaded["clap"] = extractors.ClapExtractor.from_pretrained(arguments.clap_model, device=device)
    if arguments.clip_model:
        loaded["clip"] = extractors.ClipExtractor.from_pretrained(arguments.clip_model, device=device)
    loaded["fad"] = loaded.get("clap") or extractors.LogMelExtractor(device)
    for use, chosen, classes in (
        ("fad", arguments.fad_extractor, EMBEDDERS),
        ("classifier", arguments.classifier, CLASSIFIERS),
    ):
        if chosen and chosen[0] not in classes:
            raise ValueError(f"The {use} extractor must be one of {list(classes)}, but is {chosen[0]!r}.")
        if chosen:
            loaded[use] = classes[chosen[0]].from_pretrained(chosen[1], device=device)
    return loaded


def read_captions(path: Path | None, rows: Sequence[dict]) -> list[str]:
    """The captions that bridge picture and music in IMSM: those of a file, or the set's own, each once."""
    texts = read_lines(path) if path else [row["caption"] for row in rows]
    captions = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if len(captions) < 2:
        raise ValueError(f"IMSM needs at least 2 different captions, but {path or 'the set'} has {len(captions)}.")
    return captions


def read_options(arguments: argparse.Namespace, pipe: MelFusionPipeline | None) -> dict:
    """The seed, what the pipeline is called with, and the sampling rate at which clips are scored: its own."""
    if pipe is None and arguments.audio_length_in_s is None:
        raise ValueError("Without `--checkpoint`, `--audio_length_in_s` is needed: how much of each clip is scored.")
    call = {"audio_length_in_s": arguments.audio_length_in_s or pipe.default_audio_length_in_s}
    if pipe is not None:
        call |= {"feature_source": arguments.feature_source or pipe.default_feature_source}
        call |= {"synapse_scale": arguments.synapse_scale}
        # Written out, so that the results say what they were made with.
        defaults = {**pipe.config, "default_num_inversion_steps": pipe.default_num_inversion_steps}
        for name in CALL:
            given = getattr(arguments, name)
            call[name] = defaults[f"default_{name}"] if given is None else given
    rate = Spectrogram.sampling_rate if pipe is None else pipe.sampling_rate
    return {"seed": arguments.seed, "call": call, "sampling_rate": rate}


def describe_settings(arguments: argparse.Namespace, rows: Sequence[dict], options: dict, captions: list[str]) -> dict:
    """Everything that the figures depend on, by name."""
    fad, classifier = (" ".join(pair) if pair else None for pair in (arguments.fad_extractor, arguments.classifier))
    fad = fad or (f"clap {arguments.clap_model}" if arguments.clap_model else "log-mel (fixed, no learned weights)")
    length = options["call"]["audio_length_in_s"]
    name, split = arguments.dataset_name, arguments.dataset_split
    source = f"{name} ({split})" if name else arguments.triplets
    settings = {"rows": len(rows), "pictures": len({row["image"] for row in rows}), "triplets": source}
    settings |= {"melfusion_pipeline": __version__, "checkpoint": arguments.checkpoint, "seed": options["seed"]}
    settings |= options["call"] | {"caption_model": arguments.caption_model}
    settings["storyboard_pictures"] = arguments.storyboard_pictures
    settings["scored"] = (
        f"the first {length:g} s of each clip, mono, resampled to {options['sampling_rate']} Hz, peak 0.5"
    )
    settings |= {"FAD, FAD-inf, KAD": fad, "FD, KL": classifier, "CLAP": arguments.clap_model}
    source = arguments.imsm_captions or "the set"
    bridge = f"CLIP {arguments.clip_model}, CLAP {arguments.clap_model}, {len(captions)} captions of {source}"
    settings["IMSM"] = bridge if captions else None
    settings["intervals"] = "95%, bootstrap (KL, CLAP, IMSM matched) or jackknife; rows of one picture count as one"
    return {name: value if isinstance(value, int | float) else str(value) for name, value in settings.items()}


def claim_output(arguments: argparse.Namespace, systems: Sequence[str], pipe, captioner, options: dict) -> None:
    """Claims every system's folder for these settings and weights, before the first clip is made."""
    settings = options | {"melfusion_pipeline": __version__, "weights": digest_components(pipe.components)}
    settings["triplets"] = hashlib.sha256(arguments.triplets.read_bytes()).hexdigest()
    for system in systems:
        own = {"caption_weights": digest_components({"model": captioner.model})} if system == "caption" else {}
        own |= {"storyboard_pictures": arguments.storyboard_pictures} if system == "storyboard" else {}
        claim_folder(arguments.output / system, settings | own)


def generate(
    arguments: argparse.Namespace, systems: Sequence[str], rows: Sequence[dict], pipe, accelerator, options
) -> None:
    """Makes the clips of all systems, each process those of its pictures, and waits for the others."""
    captioner = ImageCaptioner(arguments.caption_model, accelerator.device) if "caption" in systems else None
    if "shuffled" in systems:
        others = shuffle_pictures([row["image"] for row in rows], options["seed"])
        rows = [row | {"other_image": other} for row, other in zip(rows, others)]
    if accelerator.is_main_process:
        claim_output(arguments, systems, pipe, captioner, options)
    accelerator.wait_for_everyone()
    # Not the missing clips are shared out: processes that look at different times would not agree which those are.
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    clips = group_by_picture([system for system in systems if system != "storyboard"], rows)
    storyboards = group_rows(rows, arguments.storyboard_pictures) if "storyboard" in systems else []
    make_parts(pipe, share_work(clips, storyboards)[share], captioner, options, arguments.output)
    accelerator.wait_for_everyone()


def score_systems(used: dict, clips: dict[str, list[Path]], rows, captions: Sequence[str], options: dict) -> dict:
    """Scores the systems' clips; returns what `results.json` holds beside the settings."""
    seconds, rate, systems = options["call"]["audio_length_in_s"], options["sampling_rate"], {}
    target = describe_rows(used, rows, seconds, captions, rate)
    for name, paths in clips.items():
        found = extract(used, [(path, 0.0) for path in paths], seconds, captions, rate)
        scores = {column: list(interval) for column, interval in score(found, target, options["seed"]).items()}
        systems[name] = {"n": len(paths), "sampling_rate": soundfile.info(paths[0]).samplerate, "scores": scores}
    return {"systems": systems, "remarks": remarks(target)}


def write_results(output: Path, results: dict) -> None:
    """Writes results.json, results.md and results.png, each at once, and prints the table."""
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / "results.json", json.dumps(results, indent=2).encode())
    table = format_results(results)
    if results["boundaries"]:
        table += "\n" + format_boundaries(results["boundaries"])
    replace_file(output / "results.md", table.encode())
    replace_file(output / "results.png", draw_results(results))
    print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(arguments)
    # The processes wait for the slowest, which may have hours of music more to make.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])
    systems, rows = choose_systems(arguments), read_rows(arguments, accelerator)
    pipe = MelFusionPipeline.from_pretrained(arguments.checkpoint).to(accelerator.device) if systems else None
    options = read_options(arguments, pipe)
    seconds = options["call"]["audio_length_in_s"]
    if accelerator.is_main_process:
        check_set(arguments, rows, seconds)
        used = load_extractors(arguments, accelerator.device)
        captions = read_captions(arguments.imsm_captions, rows) if {"clap", "clip"} <= set(used) else []
    if systems:
        generate(arguments, systems, rows, pipe, accelerator, options)
    accelerator.end_training()
    if accelerator.is_main_process:
        folders = {system: arguments.output / system for system in systems} | dict(arguments.score)
        clips = {name: find_clips(Path(folder), rows) for name, folder in folders.items()}
        for system in systems:
            check_clips(clips[system], seconds)
        results = {"settings": describe_settings(arguments, rows, options, captions)}
        results |= score_systems(used, clips, rows, captions, options)
        results["boundaries"] = {
            name: score_boundaries(part(paths, arguments.storyboard_pictures), seconds, options["seed"])
            for name, paths in clips.items()
            if arguments.storyboard_pictures
        }
        write_results(arguments.output, results)
        if arguments.subjective:
            export_listening_test(arguments.subjective, clips, rows, seconds, options["seed"])


if __name__ == "__main__":
    with errors_in_one_line():
        main()
