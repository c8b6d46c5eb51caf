"""A checkpoint's files: composing from base models, loading, verifying, saving with the code that loads them."""

import importlib
import inspect
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, ModelMixin, UNet2DConditionModel
from diffusers.utils import logging
from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from safetensors import SafetensorError, safe_open
from transformers import (
    ClapTextModelWithProjection,
    CLIPTextModel,
    CLIPTokenizer,
    RobertaTokenizer,
    SpeechT5HifiGan,
)

from .checks_melfusion import check_components

logger = logging.get_logger(__name__)

# In an index without components of its own: the folder in which they lie.
CHECKPOINT_KEY = "_checkpoint"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
# The JSON files of a checkpoint and what each must say: one of these, or it is empty or another file.
IDENTITY_KEYS = {
    "config.json": ("_class_name", "model_type"),
    "scheduler_config.json": ("_class_name",),
    "tokenizer_config.json": ("tokenizer_class",),
    "tokenizer.json": ("model",),
}


class CheckpointMixin:
    """The methods of `MelFusionPipeline` that read and write checkpoints; to be named before `DiffusionPipeline`."""

    @classmethod
    def from_base_models(
        cls,
        image_model: str | os.PathLike,
        music_model: str | os.PathLike,
        synapse: str | os.PathLike | ModelMixin | None = None,
        **kwargs: Any,
    ) -> DiffusionPipeline:
        """Composes a Stable Diffusion checkpoint with an AudioLDM or MusicLDM checkpoint.

        Args:
            image_model: Hub id or folder of a text-to-image checkpoint with a `UNet2DConditionModel`.
            music_model: Hub id or folder of an AudioLDM or MusicLDM checkpoint.
            synapse: Hub id or folder (of a synapse alone or of a whole pipeline), a `VisualSynapse`, or None:
                untrained, with alpha = 0, so that the music does not follow the picture yet.
            **kwargs: `torch_dtype` (or dtype), `variant`, `cache_dir`, `token`, `revision`, `local_files_only`, ...,
                as `from_pretrained` takes them. Only safetensors weights are read.

        Returns:
            A pipeline with every component.

        Raises:
            ValueError: If a UNet needs a conditioning that this pipeline does not give, or the decoders do not match.
        """
        dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", dtype)
        kwargs.setdefault("use_safetensors", True)
        hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}

        def load(component_class: type, model: str | os.PathLike, subfolder: str) -> Any:
            folder = Path(model, subfolder)
            with _named_errors(folder):
                if not issubclass(component_class, torch.nn.Module):
                    return component_class.from_pretrained(model, subfolder=subfolder, **hub_kwargs)
                dtype_name = "torch_dtype" if issubclass(component_class, ModelMixin) else "dtype"
                load_kwargs = {**kwargs, dtype_name: dtype}
                component = component_class.from_pretrained(model, subfolder=subfolder, **load_kwargs)
            _check_weights(component, folder)
            return component

        scheduler_config = DDIMScheduler.load_config(music_model, subfolder="scheduler", **hub_kwargs)
        components = {
            "vae": load(AutoencoderKL, music_model, "vae"),
            "text_encoder": load(ClapTextModelWithProjection, music_model, "text_encoder"),
            "tokenizer": load(RobertaTokenizer, music_model, "tokenizer"),
            "unet": load(UNet2DConditionModel, music_model, "unet"),
            "scheduler": load(getattr(diffusers, scheduler_config["_class_name"]), music_model, "scheduler"),
            "vocoder": load(SpeechT5HifiGan, music_model, "vocoder"),
            "image_vae": load(AutoencoderKL, image_model, "vae"),
            "image_text_encoder": load(CLIPTextModel, image_model, "text_encoder"),
            "image_tokenizer": load(CLIPTokenizer, image_model, "tokenizer"),
            "image_unet": load(UNet2DConditionModel, image_model, "unet"),
            "image_scheduler": load(DDIMScheduler, image_model, "scheduler"),
        }
        _check_unets(components["image_unet"], components["unet"])
        synapse_class = importlib.import_module(f"{__package__}.modeling_melfusion").VisualSynapse
        if synapse is None:
            synapse = synapse_class.from_unets(components["image_unet"], components["unet"]).to(dtype).eval()
        elif not isinstance(synapse, ModelMixin):
            synapse = _load_synapse(synapse_class, synapse, torch_dtype=dtype, **kwargs)
        synapse.check_unets(components["image_unet"], components["unet"])
        return cls(**components, synapse=synapse)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> DiffusionPipeline:
        """Loads a checkpoint, as `DiffusionPipeline.from_pretrained`, from safetensors only.

        A folder whose index names another folder inside it as the checkpoint is followed there: so the root of this
        project's repository loads its bundled checkpoint.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            **kwargs: As `DiffusionPipeline.from_pretrained` takes them.

        Returns:
            The pipeline; the checkpoint's own code does not run.

        Raises:
            OSError: If files are missing or incomplete, also those of a folder named by the index.
            ValueError: If files are no JSON, or hold something else than the index says, or not all of the weights, or
                the folder named by the index lies outside. Either names the file or the folder.
        """
        kwargs.setdefault("use_safetensors", True)
        source = _follow_index(pretrained_model_name_or_path, cls.config_name)
        index = Path(source, cls.config_name)
        if index.is_file():
            _check_checkpoint(index, inspect.signature(cls).parameters.keys() - kwargs.keys())
        with _named_errors(source):
            pipe = super().from_pretrained(source, **kwargs)
            check_components(pipe)
            if pipe.synapse is not None:
                pipe.synapse.check_unets(pipe.image_unet, pipe.unet)
        for name in pipe.components.keys() - kwargs.keys():
            _check_weights(getattr(pipe, name), Path(source, name))
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
        """Makes another pipeline of the same components, without memory of its own.

        Args:
            pipeline: The pipeline that has them.
            **kwargs: As `DiffusionPipeline.from_pipe` takes them, such as a component to use instead.

        Returns:
            The other pipeline.
        """
        # diffusers hands over models of the annotated class only, and this file must not import the synapse's.
        kwargs.setdefault("synapse", getattr(pipeline, "synapse", None))
        return super().from_pipe(pipeline, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves the pipeline with the code that loads it, as `DiffusionPipeline.save_pretrained`.

        Everything is written to a hidden folder in `save_directory` first and moved file by file when it is complete,
        so that a full disk leaves what was there before. Weights are safetensors whatever `safe_serialization` says.

        Args:
            save_directory: The folder, made if it does not exist.
            **kwargs: As `DiffusionPipeline.save_pretrained` takes them, such as `variant`.

        Raises:
            ValueError: If `save_directory` is a file.
        """
        if not kwargs.pop("safe_serialization", True):
            logger.warning("`safe_serialization=False` is ignored: this pipeline saves safetensors only.")
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"`save_directory` must be a folder, got the file {target}.")
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", target.name)
        target.mkdir(parents=True, exist_ok=True)
        # Inside, because the folder may be a mount of its own, to which nothing can be moved from outside.
        with tempfile.TemporaryDirectory(dir=target, prefix=".partial-") as staging:
            super().save_pretrained(staging, **kwargs)
            # The index last: where it lies, what it names is complete.
            files = sorted(Path(staging).rglob("*"), key=lambda file: file.name == self.config_name)
            for file in files:
                if file.is_file():
                    destination = target / file.relative_to(staging)
                    destination.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, destination)

    def save_config(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes `model_index.json` and, beside it, the code that loads the checkpoint without this package.

        Arguments are those of `ConfigMixin.save_config`; the files go into `save_directory`.
        """
        pipeline_file = Path(__file__).with_name("pipeline_melfusion.py")
        for file in (pipeline_file, *get_relative_import_files(pipeline_file)):
            shutil.copyfile(file, Path(save_directory, Path(file).name))
        if self.synapse is not None:
            module = sys.modules[type(self.synapse).__module__]
            folder = Path(save_directory, "synapse")
            folder.mkdir(exist_ok=True)
            shutil.copyfile(module.__file__, folder / "modeling_melfusion.py")
        super().save_config(save_directory, **kwargs)

    def to_json_string(self) -> str:
        """The index as the Hub needs it: pipeline and synapse under their file names, not this package's."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = ["pipeline_melfusion", "MelFusionPipeline"]
        if self.synapse is not None:
            config["synapse"] = ["modeling_melfusion", "VisualSynapse"]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _dict_from_json_file(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # With the plain name diffusers uses this class and never runs the checkpoint's own code.
        config = super()._dict_from_json_file(*args, **kwargs)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return config

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Reads the index, as `ConfigMixin.load_config`; the synapse's class is the installed one, not the file's."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        installed = f"{__package__}.modeling_melfusion"
        if (config.get("synapse") or [None])[0] == "modeling_melfusion" and installed in sys.modules:
            config["synapse"] = [installed, "VisualSynapse"]
        return loaded


def _follow_index(folder: str | os.PathLike, index_name: str) -> str | os.PathLike:
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"`pretrained_model_name_or_path` must be a str or a path, got {folder!r}.")
    index = Path(folder, index_name)
    checkpoint = _read_json(index).get(CHECKPOINT_KEY) if index.is_file() else None
    if checkpoint is None:
        return folder
    if not isinstance(checkpoint, str) or "\0" in checkpoint:
        raise ValueError(f"{index}: `{CHECKPOINT_KEY}` must be the path of a folder, got {checkpoint!r:.80}.")
    root = Path(folder).resolve()
    target = (root / checkpoint).resolve()
    if not target.is_relative_to(root):
        raise ValueError(f"{index} names the checkpoint {checkpoint!r}, which lies outside of its folder.")
    if not (target / index_name).is_file():
        raise FileNotFoundError(
            f"The bundled checkpoint is not there yet: {index} names {checkpoint!r}, which holds no {index_name}."
            " Compose a pipeline with `MelFusionPipeline.from_base_models(image_model, music_model)`, or load another"
            " checkpoint."
        )
    return target


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {content!r:.80}.")
    return content


def _check_checkpoint(index: Path, names: Iterable[str]) -> None:
    """Refuses a folder whose files are missing, damaged or swapped: much of it would load, or fail without a name.

    Args:
        index: `model_index.json` in the folder.
        names: The components that are to be loaded.
    """
    entries = _read_json(index)
    if "_class_name" not in entries:
        raise ValueError(f"{index} is damaged or another file: it holds no _class_name.")
    for name, entry in entries.items():
        if name not in names or name.startswith("default_") or entry == [None, None]:
            continue
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise ValueError(f"{index}: `{name}` must be a pair of library and class, got {entry!r:.80}.")
        _check_component_files(index.with_name(name), entry[1])


def _check_component_files(folder: Path, class_name: str) -> None:
    kind = next((kind for kind in ("scheduler_", "tokenizer_") if kind[:-1] in class_name.lower()), "")
    config = folder / f"{kind}config.json"
    contents = {file.name: _read_json(file) for file in sorted(folder.glob("*.json"))}
    if config.name not in contents:
        raise FileNotFoundError(f"{config} is missing.")
    if kind == "tokenizer_" and not contents.keys() & {"tokenizer.json", "vocab.json"}:
        raise FileNotFoundError(f"{folder / 'tokenizer.json'} is missing: the tokenizer would know no words.")
    for name, keys in IDENTITY_KEYS.items():
        if name in contents and not contents[name].keys() & set(keys):
            raise ValueError(f"{folder / name} is damaged or another file: it holds no {' or '.join(keys)}.")

    found = contents[config.name].get("_class_name") or contents[config.name].get("tokenizer_class")
    family = str(contents[config.name].get("model_type", "")).partition("_")[0]
    if (found and str(found).removesuffix("Fast") != class_name.removesuffix("Fast")) or (
        not found and family not in class_name.lower()
    ):
        raise ValueError(f"{config} is of a {found or family}, the index names a {class_name}: are folders swapped?")
    for file in sorted(folder.glob("*.safetensors")):
        _weight_names(file)


def _weight_names(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as weights:
            return set(weights.keys())
    except (SafetensorError, OSError) as error:
        raise OSError(f"{file} is no complete safetensors file: {error}. Get it again.") from error


def _check_weights(component: Any, folder: Path) -> None:
    """Refuses a component that its files hold in part only: the libraries leave the rest at random with a warning."""
    if not isinstance(component, torch.nn.Module) or getattr(component, "hf_quantizer", None) is not None:
        return
    stored = set().union(*map(_weight_names, folder.glob("*.safetensors")))
    missing = component.state_dict().keys() - stored
    # Older files have other names for some weights, which the libraries know: those are not missing.
    if stored and len(missing) > len(stored - component.state_dict().keys()):
        names = ", ".join(sorted(missing)[:3])
        raise ValueError(f"{folder} holds too few weights for a {type(component).__name__}: no {names}, ...")


@contextmanager
def _named_errors(source: str | os.PathLike) -> Iterator[None]:
    """Gives an error that does not say what could not be loaded a name."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        if os.fspath(source) in str(error):
            raise
        raise ValueError(f"{os.fspath(source)} cannot be loaded: {type(error).__name__}: {error}") from error


def _load_synapse(synapse_class: type, synapse: str | os.PathLike, **kwargs: Any) -> ModelMixin:
    """Loads a synapse from its own folder or repository, or from a whole pipeline's."""
    try:
        return synapse_class.from_pretrained(synapse, subfolder="synapse", **kwargs)
    except OSError:
        return synapse_class.from_pretrained(synapse, **kwargs)


def _check_unets(image_unet: ModelMixin, unet: ModelMixin) -> None:
    if image_unet.config.addition_embed_type is not None or image_unet.config.class_embed_type is not None:
        raise ValueError(
            "`image_model` needs conditioning beside its text (addition_embed_type="
            f"{image_unet.config.addition_embed_type!r}, class_embed_type={image_unet.config.class_embed_type!r}):"
            " use a checkpoint of the Stable Diffusion 1 or 2 family."
        )
    if unet.config.class_embed_type != "simple_projection":
        raise ValueError(
            f"`music_model` must condition on CLAP embeddings, but its class_embed_type is"
            f" {unet.config.class_embed_type!r}: use an AudioLDM or MusicLDM checkpoint."
        )
