"""Do the tests notice mistakes? Plants one mistake at a time in a copy of the package and runs the tests concerned.

python benchmarks/mutants.py            # all of them, some minutes
python benchmarks/mutants.py ddim lerp  # those whose lines contain one of these words
"""

import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "melfusion_pipeline"
# The fast tests that must notice a mistake in each module.
TESTS = {
    "attention_melfusion": ["test_attention_melfusion"],
    "modeling_melfusion": ["test_modeling_melfusion", "test_attention_melfusion"],
    "pictures_melfusion": ["test_pictures_melfusion"],
    "features_melfusion": ["test_inversion_melfusion"],
    "inversion_melfusion": ["test_inversion_melfusion"],
    "guidance_melfusion": ["test_guidance_melfusion"],
    "prompts_melfusion": ["test_prompts_melfusion"],
    "windows_melfusion": ["test_windows_melfusion"],
    "files_melfusion": ["test_files_melfusion"],
    "metrics": ["test_metrics"],
    "vocoder_melfusion": ["test_vocoder_melfusion"],
}
# Compiling takes longer than all the rest and shows nothing that the others do not.
CHOSEN = "not compiled"
TIME_LIMIT_IN_S = 900


class Mutant(NamedTuple):
    """A mistake: in which module, what stands there, what is put in its place, and what that would mean."""

    module: str
    original: str
    replacement: str
    why: str


MUTANTS = [
    # ---------------------------------------- attention
    Mutant(
        "attention_melfusion",
        "if num_tokens <= MAX_RECORDED_TOKENS:",
        "if num_tokens <= 10**9:",
        "long layers are not pooled",
    ),
    Mutant(
        "attention_melfusion",
        "self.key, self.value = attn.to_k(tokens), attn.to_v(tokens)",
        "self.value, self.key = attn.to_k(tokens), attn.to_v(tokens)",
        "keys and values are recorded the wrong way round",
    ),
    Mutant(
        "attention_melfusion",
        "self.alpha.to(music))",
        "1 - self.alpha.to(music))",
        "alpha weighs the music instead of the picture",
    ),
    Mutant(
        "attention_melfusion",
        "(self.alpha.shape[0], image.shape[0], -1)",
        "(image.shape[0], self.alpha.shape[0], -1)",
        "the batch is laid out picture by picture",
    ),
    Mutant(
        "attention_melfusion",
        "image.unsqueeze(1).to(",
        "image.unsqueeze(1).roll(1, 0).to(",
        "rows get another row's picture",
    ),
    Mutant(
        "attention_melfusion",
        "self.blend(attn.to_v(context), self.value)",
        "self.blend(attn.to_v(context), self.key)",
        "values are blended with the picture's keys",
    ),
    Mutant(
        "attention_melfusion",
        "self.blend(attn.to_k(context), self.key)",
        "attn.to_k(context)",
        "only values are blended",
    ),
    Mutant(
        "attention_melfusion",
        "context = hidden_states if encoder_hidden_states is None else encoder_hidden_states",
        "context = hidden_states",
        "the text is ignored",
    ),
    Mutant("attention_melfusion", "attn_mask=attention_mask)", "attn_mask=None)", "the text's mask is ignored"),
    Mutant("attention_melfusion", "if attn.norm_q is not None:", "if False:", "queries are not normalised"),
    Mutant("attention_melfusion", "if attn.norm_k is not None:", "if False:", "keys are not normalised"),
    Mutant(
        "attention_melfusion",
        "if encoder_hidden_states is not None and attn.norm_cross:",
        "if False:",
        "the text is not normalised",
    ),
    Mutant("attention_melfusion", "if attn.residual_connection:", "if False:", "the residual is left out"),
    Mutant(
        "attention_melfusion",
        "return hidden_states / attn.rescale_output_factor",
        "return hidden_states * attn.rescale_output_factor",
        "the output is scaled the wrong way",
    ),
    Mutant(
        "attention_melfusion",
        "processor.key = processor.value = None",
        "pass",
        "recorded tensors stay where they were",
    ),
    Mutant(
        "attention_melfusion", "zip(self.items(), alphas)", "zip(self.items(), alphas.flip(0))", "layers swap alphas"
    ),
    Mutant(
        "attention_melfusion",
        "attn.set_processor(originals[name])",
        "pass",
        "the UNet's own processors are not restored",
    ),
    Mutant(
        "attention_melfusion",
        "if self.key is None or self.value is None:",
        "if False:",
        "an empty cell is read",
    ),
    # ---------------------------------------- the synapse
    Mutant(
        "modeling_melfusion",
        "F.adaptive_avg_pool1d(torch.eye(inputs), outputs)",
        "F.adaptive_max_pool1d(torch.eye(inputs), outputs)",
        "pooling takes maxima",
    ),
    Mutant("modeling_melfusion", "num_blocks - 1 - index)", "index)", "the levels are counted from the other end"),
    Mutant(
        "modeling_melfusion",
        "image[(2 * index + 1) * len(image) // (2 * len(music))]",
        "image[index * len(image) // len(music)]",
        "unequal decoders are matched at the ends of layers' shares",
    ),
    Mutant("modeling_melfusion", "self.alphas.zero_()", "self.alphas.fill_(0.5)", "untrained, it already blends"),
    Mutant(
        "modeling_melfusion",
        "self.alphas * torch.as_tensor(scale)",
        "self.alphas + torch.as_tensor(scale)",
        "the scale is added",
    ),
    Mutant(
        "modeling_melfusion",
        'self._project("value_projections", index, values[image_layer], tokens)',
        'self._project("value_projections", index, keys[image_layer], tokens)',
        "values are made of keys",
    ),
    Mutant(
        "modeling_melfusion",
        'self._project("value_projections", index, values',
        'self._project("key_projections", index, values',
        "values use the keys' projection",
    ),
    Mutant(
        "modeling_melfusion",
        "-(-latent_height // 2**level)",
        "(latent_height // 2**level)",
        "odd lengths are rounded down",
    ),
    Mutant("modeling_melfusion", "if found.get(layer) != width:", "if layer not in found:", "widths are not checked"),
    Mutant(
        "modeling_melfusion",
        "getattr(self, projections)[index](states)",
        "getattr(self, projections)[index](states * 2)",
        "what is fitted is doubled",
    ),
    # ---------------------------------------- inversion
    Mutant(
        "inversion_melfusion",
        "denoised = source**0.5 * latents - (1 - source) ** 0.5 * model_output",
        "denoised = source**0.5 * latents + (1 - source) ** 0.5 * model_output",
        "the sign of v",
    ),
    Mutant(
        "inversion_melfusion",
        "denoised + (1 - target) ** 0.5 * noise",
        "denoised + (1 - source) ** 0.5 * noise",
        "a step keeps the noise level of its source",
    ),
    Mutant("inversion_melfusion", 'timestep_spacing="trailing"', 'timestep_spacing="leading"', "another grid"),
    Mutant(
        "inversion_melfusion",
        "float(scheduler.final_alpha_cumprod))",
        "scheduler.alphas_cumprod[0].item())",
        "the first level is always the schedule's",
    ),
    Mutant(
        "inversion_melfusion",
        "scheduler.timesteps.tolist()[:num_inversion_steps]",
        "scheduler.timesteps.tolist()",
        "rounding may add a level below zero",
    ),
    Mutant(
        "inversion_melfusion",
        "for source in levels[:-1]], device",
        "for source in levels[1:]], device",
        "the UNet is told the step's target, as in diffusers' examples",
    ),
    Mutant("inversion_melfusion", "levels = levels[::-1]", "levels = levels[:]", "the reconstruction walks upwards"),
    Mutant(
        "inversion_melfusion",
        'if feature_source == "reconstruction" else levels[:-1]',
        'if feature_source == "reconstruction" else levels[1:]',
        "features are filed under the next step's time",
    ),
    Mutant("features_melfusion", ").abs().argmin(dim=1)", ").argmin(dim=1)", "the last step is always the nearest"),
    Mutant(
        "features_melfusion",
        "(self.keys[layer][step], self.values[layer][step])",
        "(self.keys[layer][step], self.keys[layer][step])",
        "keys are given for values",
    ),
    Mutant("pictures_melfusion", ".float() / 127.5 - 1.0", ".float() / 255.0", "pixels lie in [0, 1]"),
    Mutant("pictures_melfusion", "torch.full((2,), 0.5)", "torch.zeros(2)", "the crop is not central"),
    Mutant(
        "pictures_melfusion", "image = PIL.ImageOps.exif_transpose(image)", "pass", "photographs lie on their side"
    ),
    Mutant(
        "features_melfusion",
        "for layer, value in self.values.items()}\n        metadata",
        "for layer, value in self.keys.items()}\n        metadata",
        "keys are saved as values",
    ),
    Mutant(
        "pictures_melfusion", "array.min() < 0 or array.max() > 1", "array.min() < 0", "0 to 255 is taken for 0 to 1"
    ),
    # ---------------------------------------- guidance, prompts, windows, files
    Mutant("guidance_melfusion", "(0.0, 1.0, 1.0)", "(0.0, 0.0, 1.0)", "the branch of the picture alone is blind"),
    Mutant(
        "guidance_melfusion",
        "self.guidance_scale * (noise_pred_text - noise_pred_image)",
        "self.guidance_scale * (noise_pred_text - noise_pred_free)",
        "the text's guidance counts the picture again",
    ),
    Mutant(
        "guidance_melfusion",
        "(noise_pred_image - noise_pred_free)",
        "(noise_pred_free - noise_pred_image)",
        "the picture guides away from itself",
    ),
    Mutant("guidance_melfusion", "range(self.num_branches - 1)", "range(1)", "three branches get two prompts"),
    Mutant("guidance_melfusion", ".chunk(self.num_branches)[-1]", ".chunk(self.num_branches)[0]", "prompts swap"),
    Mutant("guidance_melfusion", "self.guidance_scale > 1.0", "self.guidance_scale >= 1.0", "1 costs a branch"),
    Mutant("prompts_melfusion", "seen * (lengths /", "seen * (seen.norm(dim=-1, keepdim=True) /", "means stay short"),
    Mutant("prompts_melfusion", "rows.unsqueeze(2)", "rows.unsqueeze(3)", "windows and waveforms change places"),
    Mutant("prompts_melfusion", "rows.movedim(0, 1).flatten(0, 2)", "rows.flatten(0, 2)", "windows come first"),
    Mutant(
        "prompts_melfusion",
        "repeat_interleave(num_waveforms_per_prompt, dim=0)",
        "repeat(num_waveforms_per_prompt, 1)",
        "waveforms get each other's prompts",
    ),
    Mutant("windows_melfusion", "/ sum(weights.values())", "", "weights do not sum to 1"),
    Mutant("windows_melfusion", "* (other < last)", "* (other < 0)", "the margin at a window's end is kept"),
    Mutant("files_melfusion", "file.name == last", "file.name != last", "the index comes first"),
    # ---------------------------------------- metrics
    Mutant("metrics", "np.sqrt(len(samples) - 1)", "np.sqrt(len(samples))", "the covariance is biased"),
    Mutant("metrics", "+ spread - 2 * cross", "+ spread - cross", "identical sets have a distance"),
    Mutant("metrics", "np.sum((mean - reference_mean) ** 2) +", "", "means do not count"),
    Mutant("metrics", "(2 * bandwidth**2)", "(bandwidth**2)", "another kernel"),
    Mutant("metrics", "mean_kernel(within) - 2 * across", "mean_kernel(within) - across", "no discrepancy but a sum"),
    Mutant(
        "metrics",
        "rel_entr(reference, generated + 1e-6)",
        "rel_entr(generated, reference + 1e-6)",
        "the divergence is the other way round",
    ),
    Mutant("metrics", "return 2.5 * np.maximum(", "return np.maximum(", "CLIPScore without its factor"),
    Mutant("metrics", "return images @ audios.T", "return audios @ images.T", "rows are audios"),
    Mutant("metrics", "similarity[others].mean()", "similarity.mean()", "matching pairs count as mismatched"),
    Mutant("metrics", "np.polyfit(1 / sizes, distances, 1)[1]", "np.polyfit(1 / sizes, distances, 1)[0]", "the slope"),
    Mutant("metrics", "size, replace=False)", "size, replace=True)", "subsets repeat clips"),
    Mutant(
        "metrics",
        "[(1 - confidence) / 2, (1 + confidence) / 2]",
        "[1 - confidence, confidence]",
        "intervals are too narrow",
    ),
    Mutant(
        "metrics",
        "(len(parts) - 1) ** 2 / len(parts)",
        "(len(parts) - 1) / len(parts)",
        "the jackknife's variance is that of a mean",
    ),
    Mutant("metrics", "return (images * audios).sum(1)", "return (images * audios).mean(1)", "pairs are averaged"),
    # ---------------------------------------- the vocoder
    Mutant("vocoder_melfusion", "- turned.imag @ sine", "+ turned.imag @ sine", "phases run backwards"),
    Mutant(
        "vocoder_melfusion",
        "torch.arange(first_frame, first_frame + frames,",
        "torch.arange(0, frames,",
        "oscillators always begin anew",
    ),
    Mutant(
        "vocoder_melfusion", "* torch.exp(2j * torch.pi * (turns % 1))", "* torch.exp(0j * turns)", "they stand still"
    ),
    Mutant(
        "vocoder_melfusion",
        "manual_seed(NOISE_SEED)",
        "manual_seed(torch.randint(2**31, ()).item())",
        "the noise is another each time",
    ),
    Mutant("vocoder_melfusion", ") / self.config.mel_std", ")", "spectrograms are not scaled"),
]


def copy_tree(target: Path) -> None:
    """Copies what the tests need; without byte code, which would hide a change of the same length."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "small_checkpoint", "images", "*.ipynb")
    for folder in (PACKAGE, "tests", "examples", "benchmarks"):
        shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
    shutil.copy(ROOT / "setup.cfg", target)


def run_tests(tree: Path, names: list[str]) -> None:
    """Runs test files of a copied tree and ends this process with pytest's exit code."""
    import pytest

    os.chdir(tree)
    sys.path = [entry for entry in sys.path if not entry.startswith(str(ROOT))]
    sys.dont_write_bytecode = True
    files = [f"tests/{name}.py" for name in names]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=-m 'not slow'", "-k", CHOSEN, *files])
    own = sys.modules.get(PACKAGE)
    if own is not None and not own.__file__.startswith(str(tree)):
        code = 99
    os._exit(int(code))


def judge(tree: Path, names: list[str]) -> str:
    """Runs tests in a child process: forked, because importing torch and diffusers anew would take longest."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(tree, names))
    process.start()
    process.join(TIME_LIMIT_IN_S)
    if process.is_alive():
        process.kill()
        return "killed (it hangs)"
    # 0: all passed; 1: a test failed; 2: the file could not be imported. All else is a mistake of this script.
    verdicts = {0: "SURVIVED", 1: "killed", 2: "killed"}
    if process.exitcode not in verdicts:
        raise RuntimeError(f"pytest ended with {process.exitcode} for {names}.")
    return verdicts[process.exitcode]


def try_mutant(tree: Path, mutant: Mutant) -> str:
    path = tree / PACKAGE / f"{mutant.module}.py"
    text = path.read_text()
    if text.count(mutant.original) != 1:
        raise ValueError(f"{mutant.module} holds {mutant.original!r} {text.count(mutant.original)} times, not once.")
    path.write_text(text.replace(mutant.original, mutant.replacement))
    try:
        return judge(tree, TESTS[mutant.module])
    finally:
        path.write_text(text)


def main(words: list[str]) -> None:
    # Shared with every child, and nothing of ours: the package itself must come from the copy.
    import diffusers.models.attention_processor  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.original for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        copy_tree(tree)
        for names in {mutant.module: TESTS[mutant.module] for mutant in chosen}.values():
            if judge(tree, names) != "SURVIVED":
                raise RuntimeError(f"{names} fail without any mutant.")
        print("| module | mistake | verdict |\n|---|---|---|", flush=True)
        verdicts = []
        for mutant in chosen:
            verdicts.append(try_mutant(tree, mutant))
            print(f"| {mutant.module} | {mutant.why} | {verdicts[-1]} |", flush=True)
    killed = sum(verdict.startswith("killed") for verdict in verdicts)
    print(f"\n{killed} of {len(verdicts)} killed.")


if __name__ == "__main__":
    main(sys.argv[1:])
