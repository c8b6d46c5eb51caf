"""The scripts of `examples/`, run as a user runs them: the first in a new Python, the others in copies of this one."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import demo
import evaluate
import generate
import listening_test
import numpy as np
import pair_triplets
import PIL.Image
import publish
import pytest
import score_film
import slideshow
import soundfile
import train_melfusion
from best_of import best_first
from command_line import errors_in_one_line, read_lines
from conftest import photograph
from extractor_checkpoints import save_clap, save_clip
from films import clicks, write_film
from processes import run_script, start_script
from slideshow import lay_out, list_pictures
from test_audio import polyphonic_music

from melfusion_pipeline.film import read_film
from melfusion_pipeline.onsets import find_onsets

ROOT = Path(__file__).parents[1]


def test_generate_writes_a_wav_and_a_picture_with_the_bundled_checkpoint(tmp_path):
    command = [sys.executable, "examples/generate.py", "--output", tmp_path, "--num_inference_steps", "10"]
    subprocess.run(command, cwd=ROOT, check=True)
    waveform, sampling_rate = soundfile.read(tmp_path / "forest_stream.wav")
    assert sampling_rate == 16000 and len(waveform) == 5.12 * 16000 and abs(waveform).max() > 0.05
    assert PIL.Image.open(tmp_path / "forest_stream.png").size == (900, 300)


def test_generate_takes_a_checkpoint(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    arguments = ("--checkpoint", tmp_path / "checkpoint", "--output", tmp_path, "--num_inference_steps", "2")
    result = run_script(ROOT / "examples" / "generate.py", *arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "forest_stream.wav").is_file()


def test_generate_takes_music_that_is_there_and_keeps_the_best(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    given = polyphonic_music(16000, 2.0).astype(np.float32) / 3
    soundfile.write(tmp_path / "song.wav", given, 16000)
    models = ("--clap_model", save_clap(tmp_path / "clap"), "--clip_model", save_clip(tmp_path / "clip"))
    (tmp_path / "captions.txt").write_text("a\nb\nc\n")
    script = (ROOT / "examples" / "generate.py", "--checkpoint", tmp_path / "checkpoint", "--output", tmp_path)
    script += ("--num_inference_steps", "2", "--audio", tmp_path / "song.wav")

    def make(*arguments):
        result = run_script(*script, *arguments, folder=tmp_path)
        assert result.returncode == 0, result.stderr
        path = result.stdout.split("wrote ")[1].split(" (")[0]
        return soundfile.read(path, dtype="float32")[0], result.stdout

    anew, _ = make("--make_anew", "0.25:0.5", "1:1.5")
    differs = np.abs(anew - given) > 2**-14
    assert len(anew) == 32000 and differs[4000:8000].any() and differs[16000:24000].any()
    assert not differs[:4000].any() and not differs[8000:16000].any() and not differs[24000:].any()
    longer, _ = make("--go_on_to", "2.5")
    assert len(longer) == 40000 and np.abs(longer[:32000] - given).max() < 2**-14
    # What was made here may be varied, and is then still there, like what else was made of the song.
    made = (tmp_path / "song-forest_stream-anew.wav").read_bytes()
    make("--audio", tmp_path / "song-forest_stream-anew.wav", "--make_anew", "1:1.5")
    assert (tmp_path / "song-forest_stream-anew.wav").read_bytes() == made
    assert (tmp_path / "song-forest_stream-longer.wav").is_file()
    best, printed = make("--strength", "0.5", "--best_of", "3", *models, "--imsm_captions", tmp_path / "captions.txt")
    assert len(best) == 32000 and printed.count("IMSM") == 3 and printed.count(", kept\n") == 1
    for arguments, message in (
        (("--best_of", "3"), "--best_of above 1 and --clap_model need each other"),
        (("--make_anew", "1-2"), "'1-2' is no stretch such as 10:20"),
        (("--strength", "0.5", "--go_on_to", "3"), "`strength` is 0.5, but `audio_length_in_s` goes on"),
    ):
        result = run_script(*script, *arguments, folder=tmp_path)
        assert result.returncode and message in result.stderr


def test_no_flag_of_generate_is_passed_over(tmp_path, monkeypatch, capsys):
    def parse(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        return generate.parse_arguments()

    judges = ("--clip_model", "clip", "--imsm_captions", tmp_path / "captions.txt")
    song = tmp_path / "song.wav"
    soundfile.write(song, polyphonic_music(16000, 0.5), 16000)
    (tmp_path / "captions.txt").write_text("a\n\n")
    for arguments, message in (
        (("--audio", tmp_path / "none.wav"), "none.wav does not exist"),
        (("--image", tmp_path), f"argument --image: {tmp_path} is a folder: give a file"),
        (("--output", song), "song.wav is a file: give a folder"),
        (("--audio", song, "--go_on_to", "3", "--audio_length_in_s", "4"), "in place of --audio_length_in_s"),
        (judges, "--clip_model needs --best_of above 1"),
    ):
        with pytest.raises(SystemExit):
            parse(*arguments)
        assert message in " ".join(capsys.readouterr().err.split())
    given = generate.given_music(parse("--audio", song, "--go_on_to", "0"))
    assert given["audio_length_in_s"] == 0
    # Before CLAP is loaded, and before any music is made.
    with pytest.raises(ValueError, match="--imsm_captions must hold two captions at least"):
        generate.load_judges(parse("--best_of", "3", "--clap_model", "nowhere", *judges))


# Of every script: what its other arguments need, and arguments that cannot be right. FILE, FOLDER and NONE are paths.
WRONG_ARGUMENTS = {
    generate: ((), "--image NONE, --image FOLDER, --audio NONE, --imsm_captions NONE, --output FILE, --output FILE/a,"
               " --seed -1, --seed 1e3, --seed 9999999999999999999, --best_of 0, --num_inference_steps 0,"
               " --audio_length_in_s nan, --audio_length_in_s long"),
    demo: ((), "--output FILE, --seed x, --num_inference_steps -1"),
    slideshow: (("FOLDER",), "--prompts NONE, --prompts FOLDER, --output FOLDER, --output FILE/a.mp4, --total 0"
                ", --seed -1"),
    score_film: (("FILE",), "--shots NONE, --output FOLDER, --variations 0"),
    listening_test: (
        ("export", "--triplets", "FILE", "--systems", "a=FOLDER", "--audio_length_in_s", "1", "--output", "NONE"),
        "--triplets NONE, --triplets FOLDER, --audio_length_in_s inf, --num_items 0, --output FILE/a",
    ),
    publish: (("--checkpoint", "FOLDER", "--hub_model_id", "a/b"), "--output FILE, --results NONE, --seed -1"
              ", --audio_length_in_s 0, --num_inference_steps 0, --hub_model_id a/b..c"),
    evaluate: (("--triplets", "FILE", "--output", "NONE"), "--triplets NONE, --data_root FILE, --data_root NONE"
               ", --output FILE, --imsm_captions NONE, --subjective FOLDER, --subjective FILE/a, --seed x"
               ", --audio_length_in_s 0, --num_inversion_steps 0"),
    pair_triplets: (tuple("--pictures a --music a --clip_model a --clap_model a --output FOLDER".split()),
                    "--drop NONE, --drop FILE, --bridge NONE, --cache FILE, --reuse 0"
                    ", --audio_length_in_s inf, --duplicates nan"),
    train_melfusion: (
        ("--train_data", "FILE", "--output_dir", "NONE", "--pretrained_model_name_or_path", "x"),
        "--train_data NONE, --data_root FILE, --trajectory_cache FILE, --music_latents_cache FILE, --output_dir FILE/a"
        ", --audio_length_in_s 1e9, --seed 4294967296",
    ),
}  # fmt: skip


@pytest.mark.parametrize("script", WRONG_ARGUMENTS, ids=lambda script: script.__name__)
def test_arguments_that_cannot_be_right_are_named_before_any_work(script, tmp_path, monkeypatch, capsys):
    paths = {"FILE": tmp_path / "file.jsonl", "FOLDER": tmp_path / "folder", "NONE": tmp_path / "none"}
    paths["FOLDER"].mkdir()
    paths["FILE"].write_text("")
    needed, wrong = WRONG_ARGUMENTS[script]
    for pair in wrong.split(", "):
        words = [*needed, *pair.split()]
        for name, path in paths.items():
            words = [word.replace(name, str(path)) for word in words]
        monkeypatch.setattr(sys, "argv", [script.__name__, *words])
        with pytest.raises(SystemExit) as end:
            script.main()
        said = capsys.readouterr().err.rpartition("error: ")[2]
        # What --drop takes pairs out of lies in --output.
        flag = "--output" if pair == "--drop FILE" else words[-2]
        assert end.value.code == 2 and (flag in said or words[-1] in said), (pair, said)
        assert not paths["NONE"].exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"image": 1}', '{"test": "a", "clips": {"1-A": 3}}'])
def test_files_that_these_scripts_did_not_write_are_named(tmp_path, content):
    (tmp_path / "pairs.jsonl").write_text(content or "{}")
    with pytest.raises(ValueError, match=r"pairs\.jsonl' holds no pairs that this script wrote"):
        pair_triplets.read_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "key.json").write_text(content)
    with pytest.raises(ValueError, match=r"key\.json' is no key.json of a listening test"):
        listening_test.read_key(tmp_path / "key.json")


def test_a_text_of_no_known_encoding_is_named(tmp_path):
    (tmp_path / "lines.txt").write_bytes(b"caf\x81\n")
    with pytest.raises(ValueError, match=r"lines\.txt' is neither UTF-8, UTF-16 nor cp1252"):
        read_lines(tmp_path / "lines.txt")


def test_errors_that_say_what_to_do_are_one_line_and_faults_keep_their_traceback(capsys):
    for action, message in (
        (lambda: lay_out(3, [0.0], None), "error: Each picture needs more than 0"),
        (lambda: open("none"), "error: [Errno 2] No such file or directory: 'none'"),
    ):
        with pytest.raises(SystemExit, match=message.replace("[", r"\[")), errors_in_one_line():
            action()
    with pytest.raises(ValueError, match="need at least one array"), errors_in_one_line():
        np.concatenate([])
    # In our own code, but nothing that it says.
    with pytest.raises(TypeError, match="has no len"), errors_in_one_line():
        lay_out(3, 1.0, None)


def test_a_model_of_another_kind_is_named_in_one_line(tmp_path):
    clip = save_clip(tmp_path / "clip")
    arguments = ("--pictures", ROOT / "examples" / "images", "--music", tmp_path, "--output", tmp_path / "set")
    soundfile.write(tmp_path / "song.wav", polyphonic_music(16000, 1.0), 16000)
    models = ("--clip_model", clip, "--clap_model", clip)
    result = run_script(ROOT / "examples" / "pair_triplets.py", *arguments, *models, folder=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last == f"pair_triplets.py: error: {str(clip)!r} holds a model of the type 'clip', but 'clap' is needed."


def test_the_best_variation_has_the_best_ranks():
    scores = {"CLAP": np.array([0.3, 0.2, 0.1, 0.25]), "IMSM": np.array([0.1, 0.4, 0.2, 0.3])}
    # Ranks 1 + 4, 3 + 1, 4 + 3, 2 + 2: of the two with 4 the one with the better CLAP score.
    assert best_first(scores).tolist() == [3, 1, 0, 2]
    assert best_first({"CLAP": scores["CLAP"]}).tolist() == [0, 3, 1, 2]


def test_the_demo_writes_eight_wavs_two_pictures_and_a_whole_table(tmp_path):
    # Both streams into one, as a terminal shows them: no progress bar may run through the table.
    command = (ROOT / "examples" / "demo.py", "--output", tmp_path, "--num_inference_steps", "2")
    start_script(*command, output=tmp_path / "printed").join()
    printed = (tmp_path / "printed").read_text()
    assert len(list(tmp_path.glob("*.wav"))) == 8
    assert PIL.Image.open(tmp_path / "sheet.png").width > 1000
    assert PIL.Image.open(tmp_path / "opposites.jpg").width == PIL.Image.open(ROOT / "examples/opposites.jpg").width
    header, *rows, last = printed.splitlines()[-10:]
    assert header.startswith("picture") and last.startswith("wrote 8 WAVs")
    assert {row.split()[0] for row in rows} == set("rocket_at_night fog mountain_lake rocket_hall".split())
    assert all("waltz" in row or "march" in row for row in rows)


def test_another_package_called_evaluate_is_not_taken_for_ours(tmp_path):
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "__init__.py").write_text("raise ImportError('this is another package')")
    script = ROOT / "examples" / "small_checkpoint" / "evaluate_checkpoint.py"
    result = run_script(script, "--help", paths=[tmp_path], folder=tmp_path)
    assert result.returncode == 0 and "usage: evaluate_checkpoint.py" in result.stdout, result.stderr


@pytest.fixture
def folder(pipe, tmp_path):
    """A small checkpoint, five pictures, and a film of four shots."""
    pipe.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "pictures").mkdir()
    for name in (1, 2, 10):
        photograph(name, 90, 60).save(tmp_path / "pictures" / f"{name}.png")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    write_film(tmp_path / "film.mp4", sound=clicks([1.3, 2.4], 4))
    return tmp_path


def make(folder, script, *arguments):
    settings = ("--checkpoint", folder / "checkpoint", "--num_inference_steps", "2", "--preview")
    result = run_script(ROOT / "examples" / script, *arguments, *settings, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_slide_show_is_made_of_a_folder_and_changes_on_the_beat(folder):
    (folder / "prompts.txt").write_text("a\nb\n\nc\n")
    size = ("--prompts", folder / "prompts.txt", "--seconds", "1", "1.5", "1", "--size", "160x90")
    printed = make(folder, "slideshow.py", folder / "pictures", *size, "--output", folder / "new" / "show.mp4")
    assert sorted(path.name for path in (folder / "new").iterdir()) == [
        "show.json",
        "show.mp4",
        "show.png",
        "show.wav",
    ]
    film, (waveform, rate) = read_film(folder / "new" / "show.mp4"), soundfile.read(folder / "new" / "show.wav")
    assert film.duration == pytest.approx(3.5, abs=0.03) and len(waveform) == 3.5 * rate
    table = json.loads((folder / "new" / "show.json").read_text())
    assert [Path(row["picture"]).name for row in table] == ["1.png", "2.png", "10.png"]
    assert [row["asked_for"] for row in table] == [0, 1, 2.5]
    onsets, moved = find_onsets(waveform.astype(np.float32), rate)[0], 0
    for row in table[1:]:
        # A third of a second's stretch is how far a change may go here.
        if np.abs(onsets - row["asked_for"]).min(initial=9) < 0.33:
            assert np.abs(onsets - row["start"]).min() < 0.04
            moved += row["start"] != row["asked_for"]
    assert f"{moved} of 2 changes moved" in printed and PIL.Image.open(folder / "new" / "show.png").width > 1000


def test_a_film_is_scored_by_its_shots(folder):
    (folder / "shots.csv").write_text("start\n1.0\n2.0\n")
    output = folder / "scored.mp4"
    arguments = ("--variations", "2", "--shots", folder / "shots.csv", "--old_sound", "keep", "--output", output)
    printed = make(folder, "score_film.py", folder / "film.mp4", *arguments)
    assert read_film(output).duration == pytest.approx(4, abs=0.01)
    table = json.loads(output.with_suffix(".json").read_text())
    assert [(row["shot"], row["start"], row["end"]) for row in table] == [(1, 0, 1), (2, 1, 2), (3, 2, 4)]
    assert all(row["start"] < row["picture_at"] < row["end"] and 0 <= row["arousal"] <= 1 for row in table)
    assert "4.0 s, 3 shots, 3 pictures" in printed and "the best of" in printed and "shifted at random" in printed
    assert output.with_suffix(".png").is_file()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_sentences_are_read_in_the_encodings_that_editors_write(tmp_path, encoding):
    (tmp_path / "sentences.txt").write_text("ein Walzer für Klavier\n\n a harp \n", encoding=encoding)
    arguments = argparse.Namespace(prompts=tmp_path / "sentences.txt")
    assert slideshow.read_prompts(arguments, 2) == ["ein Walzer für Klavier", "a harp"]
    with pytest.raises(ValueError, match="has 2 lines for 3 pictures or shots"):
        slideshow.read_prompts(arguments, 3)


def test_what_cannot_become_a_slide_show_or_a_film_is_refused_by_name(folder, monkeypatch, capsys):
    with pytest.raises(ValueError, match="There is no picture in"):
        list_pictures([folder / "checkpoint"])
    (folder / "pictures" / "phone.HEIC").write_bytes(b"")
    assert len(list_pictures([folder / "pictures"])) == 3
    assert capsys.readouterr().out.endswith("as Pillow does not open them: 1 .heic, 1 .txt\n")
    assert lay_out(3, [2.0], None) == ([0, 2, 4], 6) and lay_out(4, [6.0], 10.0) == ([0, 2.5, 5, 7.5], 10)
    with pytest.raises(ValueError, match="--seconds takes one number or one a picture, got 2 for 3 pictures"):
        lay_out(3, [1.0, 2.0], None)
    for seconds in (0.0, float("nan"), 3600.0):
        with pytest.raises(ValueError, match="more than 0 and less than 3600 seconds"):
            lay_out(3, [seconds], None)
    for command, message in (
        ((slideshow, folder / "pictures" / "notes.txt"), "notes.txt' cannot be read as a picture"),
        ((slideshow, folder / "pictures", "--size", "wide"), "'wide' is no size such as 1280x720"),
        ((slideshow, folder / "pictures", "--size", "1281x720"), "'1281x720' must be even numbers, 16 at least"),
        ((slideshow, "a waltz for piano", folder / "pictures"), "no folder; a sentence is given as --prompt"),
        ((slideshow, folder / "pictures", "--output", folder / "show 1.5 m"), "show 1.5 m must end in .mp4"),
        ((slideshow, folder / "pictures", "--output", folder / "pictures" / "1.mp4"), "1.png' is one of the pictures"),
        ((slideshow, folder / "pictures", "--output", "/proc/show.mp4"), "/proc/"),
        ((score_film, folder / "film.mp4", "--output", "/proc/film.mp4"), "/proc/"),
        ((score_film, folder / "film.mp4", "--old_sound_gain_in_db", "100"), "in [-120, 40], got 100"),
        ((score_film, folder / "film.mp4", "--output", folder / "film.mp4"), "--output is the film itself"),
        ((score_film, folder / "film.mp4", "--output", folder / "film.webm"), "(h264) cannot be copied into"),
        ((score_film, folder / "pictures" / "1.png.mp4"), "1.png.mp4"),
    ):
        monkeypatch.setattr(sys, "argv", list(map(str, [command[0].__name__, *command[1:]])))
        # All of it is refused before minutes of music are made.
        monkeypatch.setattr(command[0], "load_pipeline", None)
        with pytest.raises((SystemExit, ValueError, OSError)) as refused:
            command[0].main()
        said = capsys.readouterr().err.splitlines()[-1] if refused.type is SystemExit else str(refused.value)
        assert message in said
