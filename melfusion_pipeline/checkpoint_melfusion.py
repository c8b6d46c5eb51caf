"""A checkpoint's files: composing from base models, loading, verifying, saving with the code that loads them."""

import functools
import importlib
import inspect
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    ModelMixin,
    UNet2DConditionModel,
)
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import logging
from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from safetensors import SafetensorError, safe_open
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    SpeechT5HifiGan,
)

from .adapters_melfusion import check_lora, install_lora, read_lora
from .checks_melfusion import check_components
from .families_melfusion import family_of
from .files_melfusion import staged_folder
from .prompts_melfusion import TEXT_COMPONENTS
from .sources_melfusion import HUB_ARGUMENTS, Source, follow_index, is_of_variant, is_pickle, read_json

logger = logging.get_logger(__name__)

# What AudioLDM, MusicLDM and AudioLDM 2 were trained on; the `sample_size` of published UNets may be half of it.
BASE_LENGTH_IN_S = 10.24
# Every JSON file of this name holds one of these keys at least; one without is damaged, or another file.
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
        *,
        image_vae: str | os.PathLike | ModelMixin | None = None,
        variant: str | None = None,
        image_variant: str | None = None,
        music_variant: str | None = None,
        revision: str | None = None,
        image_revision: str | None = None,
        music_revision: str | None = None,
        **kwargs: Any,
    ) -> DiffusionPipeline:
        """Composes a Stable Diffusion checkpoint with a text-to-music checkpoint.

        What the music model is, the configuration of its UNet tells: AudioLDM 2's is an
        `AudioLDM2UNet2DConditionModel`, AudioLDM's and MusicLDM's a `UNet2DConditionModel` that takes `class_labels`,
        others' (Tango) one that takes a text.

        Weights are read from safetensors where there are any, else from `.bin` files by torch's restricted unpickler,
        which runs no code; a warning names these files. `use_safetensors=True` refuses them.

        A call then takes the scheduler of the music model and 50 steps, a quarter of what AudioLDM's authors take by
        default. That six steps of a multistep solver (DPM-Solver++) are enough was measured with the small checkpoint
        only; with AudioLDM's weights it remains to be tried.

        Args:
            image_model: Hub id or folder of a text-to-image checkpoint with a `UNet2DConditionModel`.
            music_model: Hub id or folder of a text-to-music checkpoint in diffusers' layout.
            synapse: Hub id or folder (of a synapse alone or of a whole pipeline), a `VisualSynapse`, or None:
                untrained, with alpha = 0, so that the music does not follow the picture yet. A LoRA of the music UNet
                that lies beside a synapse (pytorch_lora_weights.safetensors) is loaded with it.
            image_vae: In place of the VAE of `image_model`: an `AutoencoderTiny`, which encodes a picture with less
                work and not quite the same, or an `AutoencoderKL`; Hub id, folder or model.
            variant: The variant of the weights, such as "fp16"; a component that has no such files is read from its
                plain ones.
            image_variant: The variant of `image_model`. None is `variant`.
            music_variant: The variant of `music_model`. None is `variant`.
            revision: Branch, tag or commit of the Hub repositories.
            image_revision: The revision of `image_model`. None is `revision`.
            music_revision: The revision of `music_model`. None is `revision`.
            **kwargs: `torch_dtype` (or dtype), `cache_dir`, `token`, `local_files_only`, ..., as `from_pretrained`
                takes them, and `spectrogram_fft_length`, ... of a music model whose spectrogram is not AudioLDM's.

        Returns:
            A pipeline with every component.

        Raises:
            OSError: If files are missing, or damaged.
            ValueError: If a UNet needs a conditioning that this pipeline does not give, components, a synapse or a
                LoRA belong to another music model, the decoders do not match, files hold not all of the weights or
                more than weights, or nothing is there of a variant.
        """
        dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", dtype)
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        image = Source("image_model", image_model, image_variant or variant, image_revision or revision, **hub)
        music = Source("music_model", music_model, music_variant or variant, music_revision or revision, **hub)
        for wanted, sources in ((variant, [image, music]), (image_variant, [image]), (music_variant, [music])):
            if wanted and not any(source.has_variant() for source in sources):
                names = " or ".join(source.name for source in sources)
                raise ValueError(f"There are no weights of `variant={wanted}` in {names}.")
        settings = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("spectrogram_")}
        pickles = []

        def load(component_class: type, source: Source, subfolder: str) -> Any:
            return _load_component(component_class, source, subfolder, pickles, dtype, **kwargs)

        family = family_of(_read_config(music, "unet"))
        synapse_class = importlib.import_module(f"{__package__}.modeling_melfusion").VisualSynapse
        lora = None
        if synapse is not None and not isinstance(synapse, ModelMixin):
            synapse = _synapse_source(synapse, variant, revision, hub, cls.config_name)
            if LORA_WEIGHT_NAME_SAFE in synapse[0].names(synapse[1]):
                lora = read_lora(*synapse, LORA_WEIGHT_NAME_SAFE)
        vae_class, vae_source = AutoencoderKL, (image, "vae")
        if image_vae is not None and not isinstance(image_vae, ModelMixin):
            vae_class, vae_source = _image_vae_source(image_vae, variant, revision, hub)
        _check_base_models(image, music, family, synapse, synapse_class, lora)
        scheduler_config = DDIMScheduler.load_config(music.fetch("scheduler"))
        components = {
            "vae": load(AutoencoderKL, music, "vae"),
            **{name: load(component, music, name) for name, component in family.components.items()},
            "unet": load(family.unet_class, music, "unet"),
            "scheduler": load(getattr(diffusers, scheduler_config["_class_name"]), music, "scheduler"),
            "vocoder": load(SpeechT5HifiGan, music, "vocoder"),
            "image_vae": image_vae if isinstance(image_vae, ModelMixin) else load(vae_class, *vae_source),
            "image_text_encoder": load(CLIPTextModel, image, "text_encoder"),
            "image_tokenizer": load(CLIPTokenizer, image, "tokenizer"),
            "image_unet": load(UNet2DConditionModel, image, "unet"),
            "image_scheduler": load(DDIMScheduler, image, "scheduler"),
        }
        if synapse is None:
            synapse = synapse_class.from_unets(components["image_unet"], components["unet"]).to(dtype).eval()
        elif not isinstance(synapse, ModelMixin):
            synapse = load(synapse_class, *synapse)
        if lora is not None:
            install_lora(components["unet"], *lora, "default_0")
        _warn_of_pickles(pickles)
        return cls(**components, synapse=synapse, default_window_length_in_s=BASE_LENGTH_IN_S, **settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> DiffusionPipeline:
        """Loads a checkpoint, as `DiffusionPipeline.from_pretrained`.

        Weights are read as `from_base_models` reads them. A folder or repository whose index names another folder
        inside it as the checkpoint is followed there: so the root of this project's repository loads its bundled
        checkpoint.

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
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        variant, use_safetensors = kwargs.get("variant"), kwargs.pop("use_safetensors", None)
        source = Source("pretrained_model_name_or_path", pretrained_model_name_or_path, variant, **hub)
        subfolder = follow_index(source, cls.config_name)
        folder = source.fetch(subfolder)
        names = inspect.signature(cls).parameters.keys() - kwargs.keys()
        classes = _read_index(folder / cls.config_name, names)
        weights = {name: source.weights(f"{subfolder}/{name}", use_safetensors) for name in classes}
        if variant and not any(is_of_variant(file, variant) for files in weights.values() for file in files):
            raise ValueError(f"{source.name} holds no weights of `variant={variant}`.")
        for name, class_name in classes.items():
            _check_component_files(source.fetch(f"{subfolder}/{name}", weights[name]), class_name)
        pickles = [f"{folder / name / file}" for name, files in weights.items() for file in files if is_pickle(file)]
        with _named_errors(source.name):
            pipe = super().from_pretrained(folder, use_safetensors=use_safetensors if pickles else True, **kwargs)
            check_components(pipe)
            if pipe.synapse is not None:
                pipe.synapse.check_unets(pipe.image_unet, pipe.unet)
        _warn_of_pickles(pickles)
        for name, files in weights.items():
            _check_weights(getattr(pipe, name), folder / name, files, variant)
        pipe.register_to_config(_name_or_path=source.name)
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
        # diffusers hands over models of the annotated class only, and this file must not import those of the package.
        own = {name: getattr(pipeline, name) for name in _own_components(pipeline.config)}
        return super().from_pipe(pipeline, **{"synapse": None, **own, **kwargs})

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves the pipeline with the code that loads it, as `DiffusionPipeline.save_pretrained`.

        Everything is written to a hidden folder in `save_directory` first and moved file by file when it is complete,
        so that a full disk leaves what was there before. Weights are safetensors whatever `safe_serialization` says.

        Args:
            save_directory: The folder, made if it does not exist.
            **kwargs: As `DiffusionPipeline.save_pretrained` takes them, such as `variant`.

        Raises:
            ValueError: If `save_directory` is a file, or a model has an adapter (LoRA) installed: its weights would be
                saved under names that no model without the adapter has.
        """
        if not kwargs.pop("safe_serialization", True):
            logger.warning("`safe_serialization=False` is ignored: this pipeline saves safetensors only.")
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"`save_directory` must be a folder, got the file {target}.")
        for name, component in self.components.items():
            # Every layer that PEFT wraps keeps the original under this name.
            if isinstance(component, torch.nn.Module) and any(hasattr(m, "base_layer") for m in component.modules()):
                raise ValueError(
                    f"`{name}` has an adapter (LoRA) installed, and what is saved must be the pipeline alone. For that"
                    " of `unet` call `pipe.fuse_lora()` to keep what it does, then `pipe.unload_lora_weights()`;"
                    " `pipe.save_lora_weights(folder, pipe.unet)` before saves the adapter itself."
                )
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", target.name)
        target.mkdir(parents=True, exist_ok=True)
        with staged_folder(target, last=self.config_name) as staging:
            super().save_pretrained(staging, **kwargs)

    def save_config(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes `model_index.json` and, beside it, the code that loads the checkpoint without this package.

        Arguments are those of `ConfigMixin.save_config`; the files go into `save_directory`.
        """
        for file in _code_files():
            shutil.copyfile(file, Path(save_directory, file.name))
        for name, (module, _) in _own_components(self.config).items():
            folder = Path(save_directory, name)
            folder.mkdir(exist_ok=True)
            file = Path(sys.modules[module].__file__)
            shutil.copyfile(file, folder / file.name)
        super().save_config(save_directory, **kwargs)

    def to_json_string(self) -> str:
        """The index as the Hub needs it: pipeline and own components under their file names, not this package's."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = ["pipeline_melfusion", "MelFusionPipeline"]
        # What other families of music models encode texts with: the index of a checkpoint names what it might have.
        for name in set(TEXT_COMPONENTS) - self.prompts.components.keys():
            config.pop(name, None)
        for name, (module, class_name) in _own_components(config).items():
            config[name] = [module.rpartition(".")[2], class_name]
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
        """Reads the index, as `ConfigMixin.load_config`; own components' classes are the installed ones."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, (module, class_name) in _own_components(config).items():
            installed = f"{__package__}.{module}"
            if installed in sys.modules:
                config[name] = [installed, class_name]
        return loaded


@functools.cache
def _code_files() -> list[Path]:
    """The pipeline's file and those that it imports, which diffusers names once for every import of each."""
    pipeline_file = Path(__file__).with_name("pipeline_melfusion.py")
    return sorted({pipeline_file, *map(Path, get_relative_import_files(pipeline_file))})


def _own_components(config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The components whose classes are this package's or a checkpoint's copy of them: module and class by name."""
    return {
        name: tuple(entry)
        for name, entry in config.items()
        if not name.startswith("_")
        and isinstance(entry, (list, tuple))
        and len(entry) == 2
        and str(entry[0]).endswith("_melfusion")
    }


def _read_index(index: Path, names: Iterable[str]) -> dict[str, str]:
    """The classes of those components of `names` that a checkpoint has.

    Args:
        index: `model_index.json` in the folder.
        names: The components that are to be loaded.
    """
    if not index.is_file():
        raise FileNotFoundError(f"{index} is missing: this is no checkpoint of a pipeline.")
    entries, classes = read_json(index), {}
    if "_class_name" not in entries:
        raise ValueError(f"{index} is damaged or another file: it holds no _class_name.")
    for name, entry in entries.items():
        if name not in names or name.startswith(("default_", "spectrogram_")) or entry == [None, None]:
            continue
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise ValueError(f"{index}: `{name}` must be a pair of library and class, got {entry!r:.80}.")
        classes[name] = entry[1]
    return classes


def _check_component_files(folder: Path, class_name: str) -> None:
    """Refuses files that are missing, damaged or swapped: much of it would load, or fail without a name."""
    kind = next((kind for kind in ("scheduler_", "tokenizer_") if kind[:-1] in class_name.lower()), "")
    config = folder / f"{kind}config.json"
    contents = {file.name: read_json(file) for file in sorted(folder.glob("*.json"))}
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
    if is_pickle(file):
        return set(torch.load(file, map_location="meta", weights_only=True))
    try:
        with safe_open(file, framework="pt") as weights:
            return set(weights.keys())
    except (SafetensorError, OSError) as error:
        raise OSError(f"{file} is no complete safetensors file: {error}. Get it again.") from error


def _warn_of_pickles(files: list[str]) -> None:
    if files:
        logger.warning(
            f"There are no safetensors of these weights, so torch's restricted unpickler read {', '.join(files)}."
            " `save_pretrained` writes safetensors."
        )


def _load_component(
    component_class: type,
    source: Source,
    subfolder: str,
    pickles: list[str],
    dtype: torch.dtype | None,
    use_safetensors: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Loads one component with all of its weights; what it reads of pickles is added to `pickles`."""
    label = os.path.join(source.name, subfolder)
    if not source.names(subfolder):
        raise FileNotFoundError(f"{label} is missing, or holds no files.")
    if not issubclass(component_class, torch.nn.Module):
        with _named_errors(label):
            return component_class.from_pretrained(source.fetch(subfolder))
    weights = source.weights(subfolder, use_safetensors)
    if not weights:
        kinds = {None: "neither safetensors nor .bin", True: "no safetensors", False: "no .bin"}[use_safetensors]
        raise FileNotFoundError(f"{label} holds {kinds} files of weights, but {', '.join(source.names(subfolder))}.")
    files = [os.path.join(label, name) for name in weights if is_pickle(name)]
    pickles += files
    kwargs |= _loading_arguments(weights, source.variant)
    kwargs["torch_dtype" if issubclass(component_class, ModelMixin) else "dtype"] = dtype
    with _named_errors(files[0] if files else label):
        folder = source.fetch(subfolder, weights)
        component, info = component_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    _refuse_missing(label, component_class, info["missing_keys"])
    return component


def _loading_arguments(weights: list[str], variant: str | None) -> dict[str, Any]:
    variant = variant if is_of_variant(weights[0], variant) else None
    return {"use_safetensors": not is_pickle(weights[0]), "variant": variant}


def _check_weights(component: Any, folder: Path, weights: list[str], variant: str | None) -> None:
    """Refuses a component that its files hold in part only: the libraries leave the rest at random with a warning."""
    if not isinstance(component, torch.nn.Module) or getattr(component, "hf_quantizer", None) is not None:
        return
    stored = set().union(*(_weight_names(folder / name) for name in weights))
    if weights and component.state_dict().keys() - stored:
        # Older files have other names for some weights: which of them count only the library knows, so ask it.
        arguments = _loading_arguments(weights, variant)
        _, info = type(component).from_pretrained(folder, output_loading_info=True, **arguments)
        _refuse_missing(folder, type(component), info["missing_keys"])


def _refuse_missing(label: str | os.PathLike, component_class: type, missing: Iterable[str]) -> None:
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise ValueError(f"{label} lacks {len(missing)} weights of a {component_class.__name__}: {names}, ...")


@contextmanager
def _named_errors(source: str | os.PathLike) -> Iterator[None]:
    """Gives an error that does not say what could not be loaded a name."""
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        # torch has no class of its own for a lack of memory on the CPU.
        if os.fspath(source) in str(error) or (isinstance(error, RuntimeError) and "memory" in str(error)):
            raise
        raise ValueError(f"{os.fspath(source)} cannot be loaded: {type(error).__name__}: {error}") from error


def _synapse_source(
    synapse: str | os.PathLike, variant: str | None, revision: str | None, hub: dict[str, Any], index_name: str
) -> tuple[Source, str]:
    """The checkpoint that holds a synapse, alone or as a part of a pipeline, and its folder therein."""
    source = Source("synapse", synapse, variant, revision, **hub)
    folder = follow_index(source, index_name)
    whole = f"{folder}/synapse"
    return source, whole if source.names(whole) else folder


def _image_vae_source(
    image_vae: str | os.PathLike, variant: str | None, revision: str | None, hub: dict[str, Any]
) -> tuple[type, tuple[Source, str]]:
    """The class of a VAE that lies alone or as a part of a pipeline, and where."""
    source = Source("image_vae", image_vae, variant, revision, **hub)
    folder = "vae" if source.names("vae") else "."
    name = _read_config(source, folder).get("_class_name")
    classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    if name not in classes:
        raise ValueError(f"`image_vae` must be one of {list(classes)}, but {source.name} holds a {name}.")
    return classes[name], (source, folder)


def _read_config(source: Source, subfolder: str) -> dict[str, Any]:
    """The configuration of a model."""
    if "config.json" not in source.names(subfolder):
        raise FileNotFoundError(f"{os.path.join(source.name, subfolder, 'config.json')} is missing.")
    return read_json(source.fetch(subfolder) / "config.json")


def _check_base_models(
    image: Source,
    music: Source,
    family: type,
    synapse: ModelMixin | tuple[Source, str] | None,
    synapse_class: type,
    lora: tuple[dict[str, torch.Tensor], dict[str, Any]] | None,
) -> None:
    """Refuses what cannot be composed by configurations alone, before any weights are read."""
    for name, component_class in family.components.items():
        if not issubclass(component_class, torch.nn.Module) or issubclass(component_class, ModelMixin):
            continue
        kind = _read_config(music, name).get("model_type", "")
        if component_class.config_class.model_type.partition("_")[0] not in kind:
            raise ValueError(
                f"`music_model`: {os.path.join(music.name, name)} is of the kind {kind!r}, but the UNet beside it is"
                f" that of {family.name}, which needs a {component_class.__name__}."
            )
    with torch.device("meta"):
        image_unet = UNet2DConditionModel.from_config(_read_config(image, "unet"))
        unet = family.unet_class.from_config(_read_config(music, "unet"))
        if isinstance(synapse, tuple):
            synapse = synapse_class.from_config(_read_config(*synapse))
    if image_unet.config.addition_embed_type is not None or image_unet.config.class_embed_type is not None:
        raise ValueError(
            "`image_model` needs conditioning beside its text (addition_embed_type="
            f"{image_unet.config.addition_embed_type!r}, class_embed_type={image_unet.config.class_embed_type!r}):"
            " use a checkpoint of the Stable Diffusion 1 or 2 family."
        )
    if synapse is not None:
        synapse.check_unets(image_unet, unet)
    if lora is not None:
        check_lora(unet, lora[0])
