"""Where a checkpoint lies, in a folder or on the Hub: what it holds, and getting what is needed of it."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download

# Under this key an index without components names the folder that holds them.
CHECKPOINT_KEY = "_checkpoint"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# What the libraries read beside weights: configurations, vocabularies, sentencepiece models.
TEXT_SUFFIXES = (".json", ".txt", ".model")


class Source:
    """A checkpoint, in a folder or on the Hub: what it holds, and the way to get what is needed of it.

    Args:
        argument: The name of the argument that says where it is.
        name: The folder or the Hub id.
        variant: The variant of the weights, such as "fp16".
        revision: Branch, tag or commit of the Hub repository.
        **hub: The other `HUB_ARGUMENTS`.

    Raises:
        TypeError: If `name` is neither str nor path.
        OSError: If there is neither such a folder nor such a repository.
    """

    def __init__(
        self,
        argument: str,
        name: str | os.PathLike,
        variant: str | None = None,
        revision: str | None = None,
        **hub: Any,
    ) -> None:
        if not isinstance(name, (str, os.PathLike)):
            raise TypeError(f"`{argument}` must be a str or a path, got {name!r}.")
        self.name, self.variant, self.folder = os.fspath(name), variant, Path(name)
        self.paths, self.hub = None, {"revision": revision, **hub}
        if os.path.isdir(name):
            return
        try:
            first = ["model_index.json", "config.json"]
            self.folder = Path(snapshot_download(self.name, allow_patterns=first, **self.hub))
        except (OSError, ValueError) as error:
            raise OSError(f"`{argument}`: {self.name!r} is no folder, and the Hub says: {error}") from error
        # From here on the same commit, whatever is pushed meanwhile.
        self.hub["revision"] = self.folder.name
        self.paths = self._list_repository()

    def _list_repository(self) -> list[str]:
        cached = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        if self.hub.get("local_files_only"):
            return cached
        try:
            return HfApi().list_repo_files(self.name, revision=self.folder.name, token=self.hub.get("token"))
        except Exception:
            # Offline; which class of error that is differs between the client's versions.
            return cached

    def names(self, subfolder: str) -> list[str]:
        """Lists what lies in a folder of the checkpoint.

        Args:
            subfolder: The folder's path within it, "." for the checkpoint itself.

        Returns:
            The names of its files, sorted.
        """
        if self.paths is None:
            return sorted(path.name for path in (self.folder / subfolder).glob("*") if path.is_file())
        paths = map(PurePosixPath, self.paths)
        return sorted(path.name for path in paths if path.parent == PurePosixPath(subfolder))

    def weights(self, subfolder: str, use_safetensors: bool | None = None) -> list[str]:
        """Chooses the files of weights to read: safetensors before pickles, the variant before plain files.

        Args:
            subfolder: As in `names`.
            use_safetensors: True for safetensors only, False for pickles only, None for either.

        Returns:
            Their names; none if there are no weights.
        """
        suffixes = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[use_safetensors]
        for suffix in suffixes:
            for variant in dict.fromkeys((self.variant, None)):
                infix = f".{re.escape(variant)}" if variant else ""
                pattern = rf"((diffusion_)?pytorch_)?model{infix}(-\d+-of-\d+)?\.{suffix}"
                found = [name for name in self.names(subfolder) if re.fullmatch(pattern, name)]
                if found:
                    return found
        return []

    def has_variant(self) -> bool:
        """Whether a base model holds weights of the variant."""
        folders = ("unet", "vae", "text_encoder", "vocoder")
        return any(is_of_variant(name, self.variant) for folder in folders for name in self.weights(folder))

    def fetch(self, subfolder: str, weights: Iterable[str] = ()) -> Path:
        """Gets the text files of one folder, and some of weights.

        Args:
            subfolder: As in `names`.
            weights: The names of the files of weights.

        Returns:
            Where the folder lies on this machine.
        """
        if self.paths is not None:
            wanted = [name for name in self.names(subfolder) if name.endswith(TEXT_SUFFIXES)] + list(weights)
            patterns = [PurePosixPath(subfolder, name).as_posix() for name in wanted]
            snapshot_download(self.name, allow_patterns=patterns, **self.hub)
        return self.folder / subfolder


def follow_index(source: Source, index_name: str) -> str:
    """Finds the folder of the checkpoint: where the index says, or the root.

    Args:
        source: What may hold an index that names a folder.
        index_name: The name of the index' file.

    Returns:
        The folder's path within `source`.

    Raises:
        FileNotFoundError: If the folder that is named holds no index.
        ValueError: If what is named is no path, or lies outside.
    """
    if index_name not in source.names("."):
        return "."
    index = source.fetch(".") / index_name
    checkpoint = read_json(index).get(CHECKPOINT_KEY)
    if checkpoint is None:
        return "."
    if not isinstance(checkpoint, str) or "\0" in checkpoint:
        raise ValueError(f"{index}: `{CHECKPOINT_KEY}` must be the path of a folder, got {checkpoint!r:.80}.")
    root = source.folder.resolve()
    target = (root / checkpoint).resolve()
    if not target.is_relative_to(root):
        raise ValueError(f"{index} names the checkpoint {checkpoint!r}, which lies outside of its folder.")
    subfolder = target.relative_to(root).as_posix()
    if index_name not in source.names(subfolder):
        raise FileNotFoundError(
            f"The bundled checkpoint is not there yet: {index} names {checkpoint!r}, which holds no {index_name}."
            " Compose a pipeline with `MelFusionPipeline.from_base_models(image_model, music_model)`, or load another"
            " checkpoint."
        )
    return subfolder


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        file: The file.

    Returns:
        The object.

    Raises:
        ValueError: If it holds something else; the message names the file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {content!r:.80}.")
    return content


def is_pickle(file: str | os.PathLike) -> bool:
    """Says whether the name of the file of weights, `file`, is that of a pickle."""
    return os.fspath(file).endswith(".bin")


def is_of_variant(file: str, variant: str | None) -> bool:
    """Says whether the name of the file of weights, `file`, is one of the variant; of no `variant` there are none."""
    return variant is not None and f".{variant}" in file
