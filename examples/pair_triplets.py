"""Pairs pictures and music that nobody paired: triplets to train on, and a sheet to strike the wrong ones on.

python examples/pair_triplets.py --pictures photographs --music songs --output set \
    --clip_model openai/clip-vit-large-patch14 --clap_model laion/clap-htsat-unfused
python examples/pair_triplets.py --output set --drop struck.json      # what was struck on set/sheet.html
accelerate launch --num_processes 4 examples/pair_triplets.py ...      # the same, sooner

Pictures and clips meet over captions that bridge them, as IMSM measures it: how alike CLIP finds a picture and CLAP a
clip to the same phrases. Each picture gets one clip so that the sum of all scores is largest. Long pieces are cut into
clips at quiet places, near duplicates are left out. Music without a caption gets one of the phrases that fit best; its
row says so. The same command resumes: nothing is looked at or listened to twice.
"""

import argparse
import functools
import hashlib
import html
import json
import os
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from command_line import errors_in_one_line, existing_file, new_folder, positive_int, positive_seconds, read_lines
from model_card import is_repo_id
from pair_sources import Item, clips_of, cut_track, find_items
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from scipy.special import softmax
from transformers.utils import logging

from melfusion_pipeline.audio import load_random_crop, log_mel_spectrogram
from melfusion_pipeline.caches import hash_weights
from melfusion_pipeline.data import load_rows, open_image, push_triplets
from melfusion_pipeline.extractors import ClapExtractor, ClipExtractor
from melfusion_pipeline.files_melfusion import atomic_write
from melfusion_pipeline.metrics import imsm
from melfusion_pipeline.pictures_melfusion import to_rgb

HERE = Path(__file__).parent
SAMPLING_RATE = 16000
# Side of the thumbnails, of pictures and of spectrograms, by which near duplicates are known.
THUMBNAIL = 32
# An assignment of as many takes minutes and gigabytes.
MOST_SCORES = 2 * 10**8
PAIR = string.Template("""<article><img src="$image" alt="the picture" loading="lazy">
<audio controls preload="none" src="$audio"></audio>
<p class="caption">$caption</p><p class="source">$source</p><p class="score">score $score</p>
<label><input type="checkbox" data-pair="$pair">strike</label></article>""")
SOURCES = {"given": "caption of the music", "phrases": "caption made of the phrases that fit best"}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", help="folder, csv, tsv, json or jsonl file, or a set that `datasets` reads")
    parser.add_argument("--music", help="the same, with or without captions; MusicCaps' csv with its clips beside it")
    parser.add_argument("--output", type=new_folder, required=True, help="folder for pairs.jsonl and sheet.html")
    parser.add_argument("--picture_column", default="image", help="its name in a file or set")
    parser.add_argument("--music_column", default="audio")
    parser.add_argument("--caption_column", default="caption", help="of the music")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--clip_model", help="folder or Hub id")
    parser.add_argument("--clap_model", help="folder or Hub id")
    use = "file of phrases that bridge pictures and music, one a line, like 'mood: calm' (default: a list of 98)"
    parser.add_argument("--bridge", type=existing_file, default=HERE / "bridging_captions.txt", help=use)
    parser.add_argument(
        "--audio_length_in_s", type=positive_seconds, default=10.24, help="shortest clip of what is cut"
    )
    parser.add_argument(
        "--reuse", type=positive_int, default=1, help="how often each of the fewer, pictures or clips, may serve"
    )
    parser.add_argument(
        "--min_score", type=float, default=0.0, help="leave out pairs below; a run prints what is usual"
    )
    parser.add_argument("--duplicates", type=float, default=0.98, help="likeness of near duplicates; 1 keeps them all")
    parser.add_argument("--cache", type=new_folder, help="folder for embeddings (default: embeddings in --output)")
    parser.add_argument("--hub_dataset_id", help="publish the pairs as a set, such as you/pairs")
    parser.add_argument(
        "--drop", type=existing_file, nargs="+", help="lists saved by the sheet: take these out, pair nothing"
    )
    args = parser.parse_args(arguments)
    needed = () if args.drop else ("pictures", "music", "clip_model", "clap_model")
    if missing := [f"--{name}" for name in needed if getattr(args, name) is None]:
        parser.error(f"give {', '.join(missing)}, or --drop")
    if args.drop and not (args.output / "pairs.jsonl").is_file():
        parser.error(f"--output {args.output} holds no pairs.jsonl to drop pairs of: make them, or give their folder")
    if not 0 < args.duplicates <= 1 or args.audio_length_in_s < 1:
        parser.error("--duplicates must be in (0, 1], --audio_length_in_s at least 1")
    if args.hub_dataset_id and not is_repo_id(args.hub_dataset_id):
        parser.error(f"--hub_dataset_id must be like user/name, but is {args.hub_dataset_id!r}")
    return args


# ---------------------------------------- looking and listening


def cached(path: Path, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Reads tensors from a file, or computes and writes them."""
    if not path.is_file():
        with atomic_write(path) as temporary:
            save_file(compute(), temporary)
    return load_file(path)


def key_of(item: Item, *settings: object) -> str:
    """Names what is computed of an item: by its content and by what else it depends on."""
    parts = (hash_file(item.path), item.start, item.duration, *settings)
    return f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.safetensors"


@functools.cache
def hash_file(path: Path) -> str:
    """SHA-256 of a file, read once: a long piece of music has many clips."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def each_once(
    items: Sequence[Item], path_of: Callable, compute: Callable, description: str, accelerator: Accelerator
) -> list[dict[str, torch.Tensor] | None]:
    """Computes something of every item, each process its share; None is where a file cannot be read."""
    for item in tqdm(items[accelerator.process_index :: accelerator.num_processes], desc=description):
        try:
            cached(path_of(item), lambda item=item: compute(item))
        except (ValueError, OSError) as error:
            print(f"left out: {item.path}: {error}")
    accelerator.wait_for_everyone()
    return [load_file(path) if item.path.is_file() and (path := path_of(item)).is_file() else None for item in items]


def look_at(item: Item, clip: ClipExtractor) -> dict[str, torch.Tensor]:
    """A picture's CLIP embedding `[D]`, and its thumbnail."""
    picture = to_rgb(open_image(item.path))
    grey = picture.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    embedding = torch.from_numpy(clip.embed(images=[picture])[0])
    return {"embedding": embedding, "thumbnail": thumbnail(torch.from_numpy(np.array(grey, dtype=np.float32)))}


def listen_to(item: Item, clap: ClapExtractor, seconds: float) -> dict[str, torch.Tensor]:
    """The CLAP embedding `[D]` of the middle of a clip, and the thumbnail of its spectrogram."""
    duration = min(item.duration, seconds)
    start = item.start + (item.duration - duration) / 2
    waveform = load_random_crop(item.path, start, duration, duration, torch.Generator(), SAMPLING_RATE)
    embedding = torch.from_numpy(clap.embed(audio=waveform[None].numpy(), sampling_rate=SAMPLING_RATE)[0])
    mel = log_mel_spectrogram(waveform)[None, None]
    small = torch.nn.functional.interpolate(mel, (THUMBNAIL, THUMBNAIL), mode="area")[0, 0]
    return {"embedding": embedding, "thumbnail": thumbnail(small)}


def thumbnail(values: torch.Tensor) -> torch.Tensor:
    """Values `[side, side]` without their mean, at length one, so that a product is a correlation."""
    centred = (values - values.mean()).flatten().float()
    return centred / centred.norm().clamp(min=1e-6)


# ---------------------------------------- pairing


def without_duplicates(thumbnails: torch.Tensor, threshold: float) -> list[int]:
    """Lists the positions that are kept of `[N, D]`: whose thumbnails are not like an earlier one's that is kept."""
    kept: list[int] = []
    for position, likeness in enumerate(thumbnails @ thumbnails.T):
        if threshold == 1 or not kept or likeness[kept].max() < threshold:
            kept.append(position)
    return kept


def read_phrases(path: Path) -> list[tuple[str, str]]:
    """Reads the bridging captions: category, which may be empty, and phrase."""
    phrases = [
        (head.strip(), tail.strip()) if mark else ("", line)
        for line in read_lines(path)
        for head, mark, tail in [line.partition(": ")]
    ]
    if len(phrases) < 2:
        raise ValueError(f"{str(path)!r} holds {len(phrases)} phrases: at least 2 are needed to tell pictures apart.")
    return phrases


def make_caption(probabilities: np.ndarray, phrases: Sequence[tuple[str, str]]) -> str:
    """Makes a caption of the phrases that fit a clip best: of each category one, but of scenes none."""
    chosen = {}
    for index in np.argsort(-probabilities):
        category, phrase = phrases[index]
        # Phrases without categories: the best three.
        category = category or (index if len(chosen) < 3 else "scene")
        if category != "scene":
            chosen.setdefault(category, phrase)
    return ", ".join(chosen.values())


def match(similarity: np.ndarray, reuse: int = 1) -> list[tuple[int, int]]:
    """Pairs pictures and clips so that the sum of `similarity` `[pictures, clips]` is largest.

    Each serves once, of the fewer ones each `reuse` times; no pair is made twice.

    Raises:
        ValueError: If there are too many for one assignment.
    """
    fewer = int(np.argmin(similarity.shape))
    if similarity.size * reuse > MOST_SCORES:
        raise ValueError(f"{similarity.shape} pictures and clips, {reuse} times, are too many: pair them in parts.")
    pictures, clips = linear_sum_assignment(np.repeat(similarity, reuse, axis=fewer), maximize=True)
    pictures, clips = (pictures // reuse, clips) if fewer == 0 else (pictures, clips // reuse)
    return list(zip(pictures.tolist(), clips.tolist()))


def bridge(embeddings: Sequence[torch.Tensor], texts: np.ndarray, scale: float) -> np.ndarray:
    """Softmax over phrases of the scaled cosines: `A_CLIP` or `A_CLAP` of IMSM, `[N, phrases]`."""
    return softmax(scale * (torch.stack(list(embeddings)).double().numpy() @ texts.T.astype(np.float64)), axis=1)


def pair(
    args: argparse.Namespace,
    phrases: list,
    pictures: list[Item],
    looked: list,
    clips: list[Item],
    heard: list,
    models: dict,
) -> list[dict]:
    """Makes the pairs, the best first: what a row of a set holds, its score, and where the caption is from."""
    kept = []
    for items, found in ((pictures, looked), (clips, heard)):
        usable = [position for position, tensors in enumerate(found) if tensors is not None]
        if not usable:
            raise ValueError("None of the pictures, or none of the music, can be read.")
        thumbnails = torch.stack([found[position]["thumbnail"] for position in usable])
        kept.append([usable[position] for position in without_duplicates(thumbnails, args.duplicates)])
        print(f"{len(items)} found, {len(usable)} can be read, {len(kept[-1])} are no near duplicates")
    texts = [phrase for _, phrase in phrases]
    scales = models["clip"].model.logit_scale.exp().item(), models["clap"].model.logit_scale_a.exp().item()
    seen = bridge((looked[i]["embedding"] for i in kept[0]), models["clip"].embed(text=texts), scales[0])
    sound = bridge((heard[i]["embedding"] for i in kept[1]), models["clap"].embed(text=texts), scales[1])
    similarity = imsm(seen, sound)
    pairs = []
    for picture, clip in match(similarity, args.reuse):
        item = clips[kept[1][clip]]
        times = {"start": round(item.start, 3), "duration": round(item.duration, 3)}
        caption = item.caption or make_caption(sound[clip], phrases)
        texts_of = {"caption": caption, "caption_source": "given" if item.caption else "phrases"}
        score = {"score": float(similarity[picture, clip])}
        pairs.append({"image": pictures[kept[0][picture]].path, "audio": item.path, **texts_of, **times, **score})
    pairs.sort(key=lambda row: -row["score"])
    print(f"score of a pair: mean {np.mean([row['score'] for row in pairs]):.4g}; of any pair {similarity.mean():.4g}")
    good = [row for row in pairs if row["score"] >= args.min_score]
    if not good:
        raise ValueError(f"No pair reaches --min_score {args.min_score}: the best has {pairs[0]['score']:.4g}.")
    return good


# ---------------------------------------- writing


def inside(path: Path, folder: Path) -> str:
    """The path of a file relative to `folder`; what lies elsewhere is linked, or copied, into its `media` first."""
    path, folder = path.resolve(), folder.resolve()
    if not path.is_relative_to(folder):
        copy = folder / "media" / f"{hash_file(path)[:32]}{path.suffix.lower()}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.is_file():
            with atomic_write(copy) as temporary:
                try:
                    os.link(path, temporary)
                except OSError:
                    temporary.write_bytes(path.read_bytes())
        path = copy
    return path.relative_to(folder).as_posix()


def write_pairs(pairs: list[dict], output: Path) -> None:
    """Writes pairs.jsonl and sheet.html."""
    lines = [json.dumps(row) for row in pairs]
    with atomic_write(output / "pairs.jsonl") as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    with atomic_write(output / "sheet.html") as temporary:
        temporary.write_text(format_sheet(lines), encoding="utf-8")


def name_pair(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()[:16]


def format_sheet(lines: Sequence[str]) -> str:
    """Formats the sheet of the lines of pairs.jsonl, the worst first."""
    articles = []
    for line in sorted(lines, key=lambda line: json.loads(line)["score"]):
        row = json.loads(line)
        stretch = f"#t={row['start']:g},{row['start'] + row['duration']:g}"
        texts = {"image": row["image"], "audio": row["audio"] + stretch, "caption": row["caption"]}
        texts |= {"source": SOURCES[row["caption_source"]], "score": f"{row['score']:.4g}", "pair": name_pair(line)}
        articles.append(PAIR.substitute({name: html.escape(text, quote=True) for name, text in texts.items()}))
    page = string.Template((HERE / "pair_triplets.html").read_text(encoding="utf-8"))
    sheet = hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
    return page.substitute(count=len(lines), pairs="\n".join(articles), sheet=sheet)


def read_pairs(path: Path) -> list[str]:
    """Reads the lines of pairs.jsonl.

    Raises:
        ValueError: If they are not what this script wrote.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        format_sheet(lines)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} holds no pairs that this script wrote: {error!r}") from error
    return lines


def drop(output: Path, lists: Sequence[Path]) -> int:
    """Takes the pairs out of pairs.jsonl that were struck on the sheet, and gives their number.

    Raises:
        ValueError: If a list is none that the sheet saved, or of other pairs.
    """
    lines, struck = read_pairs(output / "pairs.jsonl"), set()
    for path in lists:
        try:
            struck |= set(json.loads(path.read_text(encoding="utf-8"))["struck"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is no list that the sheet saved: {error!r}") from error
    if unknown := struck - set(map(name_pair, lines)):
        raise ValueError(f"{len(unknown)} of the struck pairs are not in {str(output / 'pairs.jsonl')!r}.")
    write_pairs([json.loads(line) for line in lines if name_pair(line) not in struck], output)
    return len(struck)


def make_pairs(args: argparse.Namespace, accelerator: Accelerator) -> list[dict]:
    """Finds, looks, listens and pairs; only the main process gets the pairs."""
    media, cache, seconds = args.output / "media", args.cache or args.output / "embeddings", args.audio_length_in_s
    phrases = read_phrases(args.bridge)
    cache.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():
        where = (args.dataset_split, media)
        pictures = find_items(args.pictures, "image", args.picture_column, args.caption_column, *where)
        tracks = find_items(args.music, "audio", args.music_column, args.caption_column, *where)
    models = {
        "clip": ClipExtractor.from_pretrained(args.clip_model, device=accelerator.device),
        "clap": ClapExtractor.from_pretrained(args.clap_model, device=accelerator.device),
    }
    weights = {name: hash_weights(extractor.model).hex() for name, extractor in models.items()}

    def run(items, compute, description, *settings):
        return each_once(items, lambda item: cache / key_of(item, *settings), compute, description, accelerator)

    cuts = run(
        tracks,
        lambda item: {"cuts": torch.tensor(cut_track(item, seconds)).reshape(-1, 2)},
        "Cutting",
        "cuts",
        seconds,
    )
    clips = [clip for item, found in zip(tracks, cuts) if found for clip in clips_of(item, found["cuts"].tolist())]
    looked = run(pictures, lambda item: look_at(item, models["clip"]), "Looking", weights["clip"])
    heard = run(clips, lambda item: listen_to(item, models["clap"], seconds), "Listening", weights["clap"], seconds)
    return pair(args, phrases, pictures, looked, clips, heard, models) if accelerator.is_main_process else []


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.disable_progress_bar()
    accelerator = Accelerator()
    if args.drop:
        print(f"{drop(args.output, args.drop)} pairs dropped")
    else:
        pairs = make_pairs(args, accelerator)
        if accelerator.is_main_process:
            for row in pairs:
                row |= {name: inside(row[name], args.output) for name in ("image", "audio")}
            write_pairs(pairs, args.output)
            print(f"{len(pairs)} pairs in {args.output / 'pairs.jsonl'}; look at {args.output / 'sheet.html'}")
    if args.hub_dataset_id and accelerator.is_main_process:
        print(push_triplets(load_rows(args.output / "pairs.jsonl"), args.hub_dataset_id, args.output))
    accelerator.end_training()


if __name__ == "__main__":
    with errors_in_one_line():
        main()
