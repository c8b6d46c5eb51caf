"""The same triplets in all the forms that a set may have."""

import csv
import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import soundfile

# What names the set and its columns, as arguments of `load_rows` or `load_set`.
FORMS = ("jsonl", "csv", "parquet", "imagefolder", "audiofolder", "webdataset", "save_to_disk")


def write_triplets(folder: Path, num_rows: int, seconds: float = 1.5) -> Path:
    """Writes pictures, clips in four formats, and `set.jsonl`, whose path is returned."""
    lines = []
    for index in range(num_rows):
        chance = np.random.default_rng(index)
        suffix = ("wav", "flac", "ogg", "mp3")[index % 4]
        PIL.Image.fromarray(chance.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        sound = 0.3 * np.sin(np.arange(round(seconds * 16000)) * (0.05 + index / 100))
        soundfile.write(folder / f"{index}.{suffix}", sound + 0.01 * chance.standard_normal(len(sound)), 16000)
        row = {"image": f"{index}.png", "audio": f"{index}.{suffix}", "caption": f"tune {index}"}
        lines.append(json.dumps(row))
    (folder / "set.jsonl").write_text("\n".join(lines))
    return folder / "set.jsonl"


def write_forms(folder: Path, num_rows: int, rows_per_file: int = 1000) -> dict[str, dict]:
    """Writes all forms; gives the arguments that open each: `path` for `load_rows`, `name` for `load_set`."""
    folder.mkdir()
    rows = [json.loads(line) for line in write_triplets(folder, num_rows).read_text().splitlines()]
    with open(folder / "set.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    forms = {"jsonl": {"path": folder / "set.jsonl"}, "csv": {"path": folder / "set.csv"}}
    for name in FORMS[2:]:
        (folder / name).mkdir()
        forms[name] = {"name": str(folder / name)}
    for first in range(0, num_rows, rows_per_file):
        embedded = table_of(folder, rows[first : first + rows_per_file])
        embedded.to_parquet(folder / "parquet" / f"train-{first:05d}.parquet")
    table_of(folder, rows).save_to_disk(str(folder / "save_to_disk"))
    for name in ("imagefolder", "audiofolder"):
        write_folder(folder / name, folder, rows)
    write_tars(folder / "webdataset", folder, rows, rows_per_file)
    # All sounds of a WebDataset have one suffix here: the field's name is the suffix.
    forms["webdataset"]["columns"] = {"image": "png", "audio": "audio", "caption": "json.caption"}
    return forms


def table_of(folder: Path, rows: list[dict]) -> datasets.Dataset:
    """A table with the features Image and Audio, the files inside."""
    files = [{key: as_bytes(folder / row[key]) for key in ("image", "audio")} for row in rows]
    table = datasets.Dataset.from_list([row | file for row, file in zip(rows, files)])
    return table.cast_column("image", datasets.Image()).cast_column("audio", datasets.Audio())


def as_bytes(path: Path) -> dict:
    return {"bytes": path.read_bytes(), "path": path.name}


def write_folder(folder: Path, source: Path, rows: list[dict]) -> None:
    lines = []
    for row in rows:
        for key in ("image", "audio"):
            (folder / row[key]).write_bytes((source / row[key]).read_bytes())
        names = {"image_file_name": row["image"], "audio_file_name": row["audio"]}
        lines.append(json.dumps(names | {"caption": row["caption"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def write_tars(folder: Path, source: Path, rows: list[dict], rows_per_file: int) -> None:
    for first in range(0, len(rows), rows_per_file):
        with tarfile.open(folder / f"train-{first:05d}.tar", "w") as tar:
            for number, row in enumerate(rows[first : first + rows_per_file], start=first):
                files = {"png": (source / row["image"]).read_bytes(), "audio": (source / row["audio"]).read_bytes()}
                files["json"] = json.dumps({"caption": row["caption"]}).encode()
                for suffix, content in files.items():
                    entry = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
