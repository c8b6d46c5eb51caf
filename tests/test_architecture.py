"""The rooms of the package and who may import whom: data flows downwards, imports point upwards in this list."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "melfusion_pipeline"
# In the order of the data's way; a module imports only what stands before it.
ORDER = """
    arguments_melfusion files_melfusion locks_melfusion sources_melfusion attention_melfusion guidance_melfusion
    modeling_melfusion adapters_melfusion vocoder_melfusion pictures_melfusion features_melfusion
    inversion_melfusion windows_melfusion waveforms_melfusion given_audio_melfusion checks_melfusion
    prompts_melfusion families_melfusion decoding_melfusion encoding_melfusion denoising_melfusion
    checkpoint_melfusion pipeline_melfusion blending audio tables sets data streams caches training metrics
    extractors plotting film onsets scoring
""".split()


def own_imports(module: str) -> set[str]:
    """The modules of the package that a module names in its imports, indented ones too."""
    nodes = list(ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())))
    relative = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level}
    absolute = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    absolute |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return relative | {name.partition(".")[2] for name in absolute if name.split(".")[0] == PACKAGE.name}


def test_every_module_has_its_place_in_the_order():
    assert sorted(ORDER) == sorted(path.stem for path in PACKAGE.glob("[a-z]*.py"))


@pytest.mark.parametrize("module", ORDER)
def test_no_import_points_downwards(module: str):
    assert own_imports(module) <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", ["modeling_melfusion", "vocoder_melfusion"])
def test_a_component_that_the_hub_loads_alone_imports_nothing_of_ours(module: str):
    assert own_imports(module) == set()


def test_the_pipeline_names_every_file_that_its_helpers_import():
    """diffusers downloads what the pipeline's file names, and does not follow a helper's own imports."""
    named = own_imports("pipeline_melfusion")
    assert set().union(*map(own_imports, named)) <= named
