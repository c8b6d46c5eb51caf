"""LoRA adapters of the music UNet: reading, installing, choosing, fusing and saving them."""

import importlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from itertools import count
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.utils import (
    delete_adapter_layers,
    get_peft_kwargs,
    recurse_remove_peft_layers,
    set_adapter_layers,
    set_weights_and_activate_adapters,
)
from diffusers.utils.torch_utils import is_compiled_module
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .arguments_melfusion import check_integer, check_positive
from .files_melfusion import atomic_write
from .locks_melfusion import one_at_a_time
from .sources_melfusion import HUB_ARGUMENTS, Source

# The files' names of layers begin with the component, as in all of diffusers' LoRA files.
PREFIX = "unet."
# The settings of `peft.LoraConfig` that decide what an adapter's weights do. No others are taken from a file: some of
# them make PEFT read further files, or change the layers below.
SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")
# The attention's projections, of queries, keys, values and output.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# The convolutions of the residual blocks too: the outermost level of AudioLDM's UNet has no attention, and with the
# attention alone a LoRA falls short of what the whole UNet learns (benchmarks/README.md, "Training").
LORA_TARGETS = (*ATTENTION, "conv1", "conv2", "conv_shortcut")


class AdapterMixin(LoraBaseMixin):
    """The methods of `MelFusionPipeline` for LoRA adapters of its music UNet; to be named before `DiffusionPipeline`.

    They are those of diffusers' pipelines. What these leave to their UNets is done here: AudioLDM 2's UNet cannot.
    """

    _lora_loadable_modules = ["unet"]

    @one_at_a_time
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        weight_name: str = LORA_WEIGHT_NAME_SAFE,
        subfolder: str = ".",
        **kwargs: Any,
    ) -> None:
        """Installs an adapter in the music UNet and makes it the active one; `set_adapters` chooses otherwise.

        Args:
            pretrained_model_name_or_path_or_dict: Hub id, folder or safetensors file; or the tensors by name, of each
                layer `[rank, channels]` and `[channels, rank]`.
            adapter_name: What `set_adapters` calls it. None is "default_0", "default_1", ...
            weight_name: The name of the file.
            subfolder: Its folder within the repository.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only` and `force_download`, for the Hub.

        Raises:
            ImportError: If PEFT is not installed.
            OSError: If there is no such file, or it is damaged.
            TypeError: If there are other arguments.
            ValueError: If it is no LoRA of this music UNet, the name is taken, an adapter is fused, or the UNet is a
                compiled one.
        """
        self._refuse_while_fused("load_lora_weights")
        if is_compiled_module(self.unet):
            raise ValueError("`load_lora_weights` must come before `torch.compile`, or use `pipe.unet.compile()`.")
        if unknown := kwargs.keys() - set(HUB_ARGUMENTS):
            raise TypeError(f"`load_lora_weights` takes no {', '.join(sorted(unknown))}.")
        if isinstance(pretrained_model_name_or_path_or_dict, dict):
            state_dict, settings = pretrained_model_name_or_path_or_dict, {}
        else:
            source, weight_name = _locate(pretrained_model_name_or_path_or_dict, weight_name, kwargs)
            state_dict, settings = read_lora(source, subfolder, weight_name)
        used = getattr(self.unet, "peft_config", {})
        if adapter_name in used:
            raise ValueError(f"`adapter_name`: an adapter {adapter_name!r} is installed already; choose another name.")
        adapter_name = adapter_name or next(name for index in count() if (name := f"default_{index}") not in used)
        is_model_offload, is_sequential_offload, is_group_offload = self._optionally_disable_offloading(self)
        if is_group_offload:
            raise ValueError("`load_lora_weights` must come before group offloading, whose hooks know the layers.")
        try:
            install_lora(self.unet, state_dict, settings, adapter_name)
        finally:
            if is_model_offload:
                self.enable_model_cpu_offload()
            elif is_sequential_offload:
                self.enable_sequential_cpu_offload()

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        unet_lora_layers: ModelMixin | dict[str, torch.Tensor],
        unet_lora_adapter_metadata: dict[str, Any] | None = None,
        weight_name: str = LORA_WEIGHT_NAME_SAFE,
        adapter_name: str | None = None,
    ) -> None:
        """Writes an adapter to a safetensors file, which `load_lora_weights` of this and diffusers' pipelines reads.

        Args:
            save_directory: The folder, made if it does not exist.
            unet_lora_layers: The music UNet with the adapter; or the adapter's tensors by name, of each layer
                `[rank, channels]` and `[channels, rank]`, as `peft.get_peft_model_state_dict` gives them.
            unet_lora_adapter_metadata: The settings of `peft.LoraConfig` beside tensors, without which alpha is the
                rank. Those of a UNet's adapter are known.
            weight_name: The name of the file.
            adapter_name: Which of the UNet's adapters; may be left out if there is one.

        Raises:
            OSError: If the file cannot be written, for example on a full disk.
            ValueError: If there is no such adapter, there are no tensors, `weight_name` is no safetensors file, or
                `save_directory` is a file.
        """
        folder = Path(save_directory)
        _check_weight_name(weight_name)
        if folder.is_file():
            raise ValueError(f"`save_directory` must be a folder, got the file {folder}.")
        tensors, settings = unet_lora_layers, unet_lora_adapter_metadata or {}
        if isinstance(unet_lora_layers, nn.Module):
            tensors, settings = lora_of_unet(unet_lora_layers, adapter_name)
        if not isinstance(tensors, Mapping) or not tensors:
            raise ValueError("`unet_lora_layers` must be the music UNet with an adapter, or its tensors by name.")
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt"}
        if settings:
            settings = {name: settings[name] for name in SETTINGS if name in settings}
            # Not needed here, but by diffusers.
            settings["target_modules"] = sorted({name.partition(".lora_")[0] for name in tensors})
            settings = {f"{PREFIX}{name}": value for name, value in settings.items()}
            metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(settings, indent=2, sort_keys=True)
        tensors = {f"{PREFIX}{name}": rows.contiguous() for name, rows in tensors.items()}
        try:
            with atomic_write(folder / weight_name) as temporary:
                save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{folder / weight_name} cannot be written: {error}") from error

    @one_at_a_time
    def set_adapters(self, adapter_names: str | list[str], adapter_weights: float | list[float] | None = None) -> None:
        """Makes the named adapters the active ones.

        Args:
            adapter_names: One or several, whose effects add up.
            adapter_weights: How strongly they act, one number for all or one for each. None is 1.

        Raises:
            TypeError: If a weight is no number.
            ValueError: If there is no such adapter, the numbers are not as many or not finite, or an adapter is fused.
        """
        self._refuse_while_fused("set_adapters")
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = [*adapter_weights] if isinstance(adapter_weights, (list, tuple)) else [adapter_weights] * len(names)
        self._check_names(names)
        for weight in weights:
            _check_scale("adapter_weights", 1.0 if weight is None else weight)
        if len(weights) != len(names):
            raise ValueError(f"`adapter_weights` must be one number or {len(names)}, got {len(weights)}.")
        set_weights_and_activate_adapters(self.unet, names, [1.0 if weight is None else weight for weight in weights])

    @one_at_a_time
    def fuse_lora(
        self,
        components: list[str] = ["unet"],
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """Adds what the adapters do to the music UNet's own weights, so that a call costs what it costs without them.

        Args:
            components: The music UNet is the only one.
            lora_scale: How strongly; multiplied with the adapters' own weights.
            safe_fusing: Whether to refuse weights that would become NaN.
            adapter_names: Which; None is the active ones.

        Raises:
            TypeError: If the strength is no number.
            ValueError: If there is no such adapter, one is fused already, `components` names another one, or the
                strength is not finite.
        """
        self._refuse_while_fused("fuse_lora")
        if list(components) != ["unet"]:
            raise ValueError(f"`components` must be ['unet'], which alone has adapters here, got {components!r:.80}.")
        if not getattr(self.unet, "peft_config", None):
            raise ValueError("`fuse_lora` needs an adapter: call `load_lora_weights` before.")
        self._check_names(adapter_names or [])
        _check_scale("lora_scale", lora_scale)
        for layer in lora_layers(self.unet):
            # Not by `scale_layer`, which passes over adapters that are not active, and cannot be taken back from 0.
            layer.scaling_before_fusing = dict(layer.scaling)
            layer.scaling.update({name: scale * lora_scale for name, scale in layer.scaling.items()})
            layer.merge(safe_merge=safe_fusing, adapter_names=adapter_names)
            self._merged_adapters = self._merged_adapters | set(layer.merged_adapters)

    @one_at_a_time
    def unfuse_lora(self, components: list[str] = ["unet"]) -> None:
        """Takes back `fuse_lora`; the adapters act as before.

        Args:
            components: The music UNet is the only one.
        """
        super().unfuse_lora(components)
        for layer in lora_layers(self.unet):
            layer.scaling.update(layer.__dict__.pop("scaling_before_fusing", {}))

    @one_at_a_time
    def unload_lora_weights(self) -> None:
        """Removes all adapters. What was fused stays in the music UNet: call `unfuse_lora` before, to be rid of it."""
        remove_lora(self.unet, list(getattr(self.unet, "peft_config", {})))
        self._merged_adapters = set()

    @one_at_a_time
    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """Removes adapters.

        Args:
            adapter_names: The names of one or several.

        Raises:
            ValueError: If there is no such adapter, or one is fused.
        """
        self._refuse_while_fused("delete_adapters")
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_names(names)
        remove_lora(self.unet, names)

    @one_at_a_time
    def disable_lora(self) -> None:
        """Lets the music UNet run without its adapters until `enable_lora`."""
        set_adapter_layers(self.unet, enabled=False)

    @one_at_a_time
    def enable_lora(self) -> None:
        """Takes back `disable_lora`."""
        set_adapter_layers(self.unet, enabled=True)

    def _refuse_while_fused(self, method: str) -> None:
        # PEFT would leave out what is not fused, or take back with the new scales what was fused with the old.
        if any(layer.merged_adapters for layer in lora_layers(self.unet)):
            raise ValueError(
                f"`{method}` cannot be used while an adapter is fused: call `unfuse_lora()` before, or"
                " `unload_lora_weights()`, which leaves what is fused in the music UNet."
            )

    def _check_names(self, names: Iterable[str]) -> None:
        installed = list(getattr(self.unet, "peft_config", {}))
        if missing := [name for name in names if name not in installed]:
            raise ValueError(f"The music UNet has no adapter {', '.join(map(repr, missing))}, but {installed}.")


def lora_layers(unet: ModelMixin) -> list[nn.Module]:
    """Lists the layers that PEFT has wrapped, each a LoraLayer of PEFT.

    Args:
        unet: The music UNet, with adapters or without.

    Returns:
        Those layers, in the order of the UNet's modules.
    """
    return [module for module in unet.modules() if hasattr(module, "base_layer") and hasattr(module, "lora_A")]


def add_lora(
    unet: ModelMixin,
    rank: int = 8,
    lora_alpha: float | None = None,
    targets: Iterable[str] = LORA_TARGETS,
    seed: int = 0,
    adapter_name: str = "default",
) -> None:
    """Installs an adapter that does nothing yet, to be trained.

    Args:
        unet: The music UNet, changed in place.
        rank: The rank of what is added to each layer's weight.
        lora_alpha: `lora_alpha / rank` is what that is multiplied with. None is the rank.
        targets: The ends of the layers' names.
        seed: Of the initial weights.
        adapter_name: What it is called.

    Raises:
        ImportError: If PEFT is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If no layer has such a name, or a number is out of range.
    """
    peft = _import_peft()
    check_integer("rank", rank, 1)
    check_integer("seed", seed, 0)
    if lora_alpha is not None:
        check_positive("lora_alpha", lora_alpha)
    if isinstance(targets, str) or not isinstance(targets, Iterable):
        raise TypeError(f"`targets` must be a list of names, got {targets!r:.80}.")
    targets = [*targets]
    if not any(f".{name}".endswith(f".{target}") for name, _ in unet.named_modules() for target in targets):
        raise ValueError(f"`targets` must be ends of layers' names, as {', '.join(LORA_TARGETS)}, got {targets}.")
    config = peft.LoraConfig(r=rank, lora_alpha=rank if lora_alpha is None else lora_alpha, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, unet, adapter_name)
    unet._hf_peft_config_loaded = True


def install_lora(
    unet: ModelMixin, state_dict: Mapping[str, torch.Tensor], settings: Mapping[str, Any], adapter_name: str
) -> None:
    """Installs an adapter and makes it the active one.

    Args:
        unet: The music UNet, changed in place.
        state_dict: The adapter's tensors, by names that begin with "unet.", of each layer `[rank, channels]` and
            `[channels, rank]`.
        settings: What `read_lora` gives.
        adapter_name: What it is called.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If it is no LoRA of this UNet; the UNet is then as it was.
    """
    peft = _import_peft()
    check_lora(unet, state_dict)
    tensors = {name.removeprefix(PREFIX): rows for name, rows in state_dict.items()}
    ranks = {f"^{name}": rows.shape[1] for name, rows in tensors.items() if name.endswith(".lora_B.weight")}
    config = get_peft_kwargs(ranks, None, tensors)
    config |= {name: settings[name] for name in SETTINGS if name in settings}
    unet._hf_peft_config_loaded = True
    try:
        peft.inject_adapter_in_model(peft.LoraConfig(**config), unet, adapter_name)
        foreign = peft.set_peft_model_state_dict(unet, tensors, adapter_name).unexpected_keys
        if foreign:
            raise ValueError(f"the music UNet has no place for {foreign[0]}")
    except Exception as error:
        remove_lora(unet, [adapter_name])
        raise ValueError(f"The adapter cannot be installed: {error}") from error


def remove_lora(unet: ModelMixin, adapter_names: Iterable[str]) -> None:
    """Removes adapters, and with the last one what PEFT has wrapped around the layers.

    Args:
        unet: The music UNet, changed in place.
        adapter_names: Their names; those that it has not are passed over.
    """
    for name in adapter_names:
        if name in getattr(unet, "peft_config", {}):
            delete_adapter_layers(unet, name)
    if not hasattr(unet, "peft_config"):
        recurse_remove_peft_layers(unet)


def check_lora(unet: ModelMixin, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuses tensors that are no LoRA of this UNet.

    Args:
        unet: The music UNet; its weights may lie on the meta device.
        state_dict: The adapter's tensors, by names that begin with "unet.", of each layer `[rank, channels]` and
            `[channels, rank]`.

    Raises:
        ValueError: Naming the first tensor that does not fit.
    """
    halves: dict[str, set[str]] = {}
    for name, rows in state_dict.items():
        if not isinstance(rows, torch.Tensor) or not rows.is_floating_point() or not rows.isfinite().all():
            raise ValueError(f"`{name}` of the LoRA must be a tensor of finite floating-point numbers.")
        layer, dot, part = name.removeprefix(PREFIX).partition(".lora_")
        if not name.startswith(PREFIX) or not dot:
            raise ValueError(
                f"`{name}` is no tensor of a LoRA of the music UNet: these are called `{PREFIX}<layer>.lora_A.weight`"
                f" and `{PREFIX}<layer>.lora_B.weight`, as `save_lora_weights` writes them."
            )
        try:
            weight = unet.get_submodule(layer).weight
        except AttributeError:
            raise ValueError(f"The LoRA does not fit the music UNet, which has no layer {layer}.") from None
        axis = {"A.weight": 1, "B.weight": 0}.get(part)
        if axis is not None and (rows.ndim != weight.ndim or rows.shape[axis] != weight.shape[axis]):
            raise ValueError(
                f"The LoRA does not fit the music UNet: {name} is {list(rows.shape)}, the weight of {layer}"
                f" {list(weight.shape)}."
            )
        halves.setdefault(layer, set()).add(part)
    if layer := next((layer for layer, parts in halves.items() if not {"A.weight", "B.weight"} <= parts), None):
        raise ValueError(f"The LoRA is not complete: of lora_A and lora_B of {layer}, only one is there.")
    if not halves:
        raise ValueError("The LoRA holds no tensors.")


def read_lora(source: Source, subfolder: str, weight_name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads an adapter's file.

    Args:
        source: The folder or repository.
        subfolder: The folder within it.
        weight_name: The name of the file.

    Returns:
        The tensors by name, of each layer `[rank, channels]` and `[channels, rank]`, and the settings of
        `peft.LoraConfig` that the file holds.

    Raises:
        ImportError: If PEFT is not installed, without which the adapter is of no use.
        FileNotFoundError: If there is no such file.
        OSError: If it is damaged.
        ValueError: If it is no safetensors file, or its settings are no JSON object.
    """
    _import_peft()
    _check_weight_name(weight_name)
    if weight_name not in (names := source.names(subfolder)):
        raise FileNotFoundError(f"{os.path.join(source.name, subfolder)} holds no {weight_name}, but {names}.")
    file = source.fetch(subfolder, [weight_name]) / weight_name
    try:
        with safe_open(file, framework="pt") as content:
            tensors, metadata = {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise OSError(f"{file} is no complete safetensors file: {error}. Get it again.") from error
    try:
        settings = dict(json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {LORA_ADAPTER_METADATA_KEY} must be a JSON object: {error}.") from error
    return tensors, {name.removeprefix(PREFIX): value for name, value in settings.items()}


def lora_of_unet(unet: ModelMixin, adapter_name: str | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Takes an adapter out of a UNet, as `save_lora_weights` takes it.

    Args:
        unet: The music UNet, left as it is.
        adapter_name: Which; may be left out if there is one.

    Returns:
        The tensors, by names without "unet.", of each layer `[rank, channels]` and `[channels, rank]`, and the
        settings of its `peft.LoraConfig`.

    Raises:
        ValueError: If the UNet has no such adapter, or several and none is named.
    """
    installed = list(getattr(unet, "peft_config", {}))
    if adapter_name is None and len(installed) == 1:
        adapter_name = installed[0]
    if adapter_name not in installed:
        raise ValueError(f"`adapter_name` must be one of {installed}, the UNet's adapters, got {adapter_name!r}.")
    return (
        _import_peft().get_peft_model_state_dict(unet, adapter_name=adapter_name),
        unet.peft_config[adapter_name].to_dict(),
    )


def _locate(name: str | os.PathLike, weight_name: str, hub: dict[str, Any]) -> tuple[Source, str]:
    if isinstance(name, (str, os.PathLike)) and os.path.isfile(name):
        name, weight_name = Path(name).parent, Path(name).name
    return Source("pretrained_model_name_or_path_or_dict", name, **hub), weight_name


def _check_weight_name(weight_name: str) -> None:
    if not weight_name.endswith(".safetensors") or Path(weight_name).name != weight_name:
        raise ValueError(
            f"`weight_name` must be the name of a safetensors file, got {weight_name!r}. Files of other formats run"
            " code when they are read; a folder is `subfolder`."
        )


def _check_scale(name: str, scale: Any) -> None:
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"`{name}` must be a number, got {scale!r:.80}.")
    if not math.isfinite(scale):
        raise ValueError(f"`{name}` must be finite, got {scale}.")


def _import_peft() -> Any:
    # Not by a statement: diffusers refuses a checkpoint's code where a package that it imports is not installed.
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError("LoRA adapters need PEFT: pip install peft") from error
