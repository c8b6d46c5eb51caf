"""The stand-in for the Hub, used by the unchanged clients from processes of their own, as a user's would be."""

import http.client
import importlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from hub_standin import HubStandIn
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@contextmanager
def client_process(environment):
    """Yields a function that calls another in a new process with this environment and returns what that returns."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            pool.submit(importlib.import_module, "diffusers.pipelines.pipeline_utils")
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


def without_network(function, *args, **kwargs):
    """Calls a function as HF_HUB_OFFLINE=1 has it, which the clients read when they are imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        return function(*args, **kwargs)


@pytest.fixture(scope="module")
def hub():
    with HubStandIn() as hub:
        yield hub


@pytest.fixture(scope="module")
def call(hub, tmp_path_factory):
    with client_process(hub.environment(tmp_path_factory.mktemp("home"))) as call:
        yield call


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "one.txt").write_text("one")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(100)))
    return tmp_path


def push_pipeline(repo_id, seed, variant=None):
    import torch
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
    unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=2, **blocks)
    DDPMPipeline(unet, DDIMScheduler()).push_to_hub(repo_id, variant=variant)
    return sum_weights(unet)


def load_pipeline(repo_id, **kwargs):
    from diffusers import DDPMPipeline

    return sum_weights(DDPMPipeline.from_pretrained(repo_id, **kwargs).unet)


def push_text_model(repo_id):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "calm": 1, "sea": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").push_to_hub(repo_id)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=3, **sizes))
    model.push_to_hub(repo_id)
    return sum_weights(model)


def load_text_model(repo_id):
    from transformers import AutoModel, AutoTokenizer

    token_ids = AutoTokenizer.from_pretrained(repo_id)("calm red sea").input_ids
    return token_ids, sum_weights(AutoModel.from_pretrained(repo_id))


def sum_weights(model):
    return {name: parameter.double().sum().item() for name, parameter in model.named_parameters()}


def upload(repo_id, folder, private=False):
    HfApi().create_repo(repo_id, private=private, exist_ok=True)
    return HfApi().upload_folder(repo_id=repo_id, folder_path=folder).oid


def download(repo_id, **kwargs):
    root = Path(snapshot_download(repo_id, **kwargs))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def read(repo_id, path, **kwargs):
    return Path(hf_hub_download(repo_id, path, **kwargs)).read_bytes()


def model_info(repo_id, **kwargs):
    return HfApi().model_info(repo_id, **kwargs)


def list_tree(repo_id, **kwargs):
    return [entry.path for entry in HfApi().list_repo_tree(repo_id, **kwargs)]


def delete_file(repo_id, path):
    HfApi().delete_file(path, repo_id)


def push_card(repo_id, text):
    HfApi().create_repo(repo_id, exist_ok=True)
    ModelCard(text, ignore_metadata_errors=True).push_to_hub(repo_id)


def fetch(hub, method, path, **headers):
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def test_pipeline_comes_back_as_it_was_pushed(hub, call):
    weights = call(push_pipeline, "tester/pushed", seed=0)
    expected = {
        ".gitattributes",
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
    }
    assert set(hub.files("tester/pushed")) == expected | {UNET_WEIGHTS}
    assert call(load_pipeline, "tester/pushed") == weights


def test_variant_is_chosen_by_name(hub, call):
    weights = call(push_pipeline, "tester/variant", seed=0)
    variant_weights = call(push_pipeline, "tester/variant", seed=1, variant="fp16")
    assert call(load_pipeline, "tester/variant", variant="fp16") == variant_weights
    fetched = [path for method, path, _ in hub.requests if method == "GET" and "variant/resolve" in path]
    assert [path for path in fetched if path.endswith("model.fp16.safetensors")]
    assert not [path for path in fetched if path.endswith("model.safetensors")]
    assert call(load_pipeline, "tester/variant") == weights


def test_pushing_again_makes_a_commit_and_keeps_the_old_one(call):
    old_weights = call(push_pipeline, "tester/again", seed=0)
    old_commit = call(model_info, "tester/again").sha
    assert call(load_pipeline, "tester/again") == old_weights
    new_weights = call(push_pipeline, "tester/again", seed=1)
    assert new_weights != old_weights
    assert call(model_info, "tester/again").sha != old_commit
    assert call(load_pipeline, "tester/again") == new_weights
    assert call(load_pipeline, "tester/again", revision=old_commit) == old_weights


def test_cached_pipeline_loads_offline(hub, call):
    weights = call(push_pipeline, "tester/cached", seed=0)
    call(load_pipeline, "tester/cached")
    answered = len(hub.requests)
    assert call(without_network, load_pipeline, "tester/cached") == weights
    with pytest.raises(OSError):
        call(without_network, load_pipeline, "tester/missing")
    assert len(hub.requests) == answered


def test_tokenizer_and_transformer_come_back(call):
    weights = call(push_text_model, "tester/text")
    token_ids, loaded_weights = call(load_text_model, "tester/text")
    assert token_ids == [1, 0, 2]
    assert loaded_weights == weights


def test_uploaded_folder_is_what_is_downloaded(hub, call, folder):
    commit = call(upload, "tester/folder", folder)
    assert call(upload, "tester/folder", folder) == commit
    (folder / "notes" / "one.txt").write_text("changed")
    assert call(upload, "tester/folder", folder) != commit
    assert call(download, "tester/folder") == hub.files("tester/folder")
    assert call(download, "tester/folder", revision=commit) == hub.files("tester/folder", commit)
    assert call(read, "tester/folder", "notes/one.txt") == b"changed"
    assert call(read, "tester/folder", "notes/one.txt", revision=commit) == b"one"
    call(delete_file, "tester/folder", "notes/one.txt")
    assert call(list_tree, "tester/folder", recursive=True) == [".gitattributes", "model.safetensors"]


def test_listings_describe_files_as_the_hub_does(hub, call, folder):
    hub.add_repo("tester/listed", folder)
    siblings = {
        sibling.rfilename: sibling for sibling in call(model_info, "tester/listed", files_metadata=True).siblings
    }
    assert set(siblings) == {".gitattributes", "model.safetensors", "notes/one.txt"}
    assert siblings["model.safetensors"].lfs.sha256 == sha256(bytes(range(100))).hexdigest()
    assert siblings["notes/one.txt"].lfs is None and siblings["notes/one.txt"].size == 3
    assert call(list_tree, "tester/listed") == [".gitattributes", "model.safetensors", "notes"]
    assert call(list_tree, "tester/listed", path_in_repo="notes") == ["notes/one.txt"]


def test_download_can_resume(hub, folder):
    commit = hub.add_repo("tester/resumed", folder)
    response, _ = fetch(hub, "HEAD", "/tester/resumed/resolve/main/model.safetensors")
    digest = sha256(bytes(range(100))).hexdigest()
    assert (response.headers["X-Repo-Commit"], response.headers["X-Linked-Etag"]) == (commit, f'"{digest}"')
    assert response.headers["X-Linked-Size"] == response.headers["Content-Length"] == "100"
    response, content = fetch(hub, "GET", "/tester/resumed/resolve/main/model.safetensors", Range="bytes=90-")
    assert (response.status, response.headers["Content-Range"]) == (206, "bytes 90-99/100")
    assert content == bytes(range(90, 100))


def test_upload_must_have_its_announced_hash(hub):
    response, _ = fetch(hub, "PUT", f"/lfs/{'0' * 64}")
    assert response.status == 400


def test_what_is_missing_is_named(hub, call, folder):
    hub.add_repo("tester/present", folder)
    with pytest.raises(RepositoryNotFoundError):
        call(model_info, "tester/missing")
    with pytest.raises(OSError):
        call(load_pipeline, "tester/missing")
    with pytest.raises(RevisionNotFoundError):
        call(model_info, "tester/present", revision="missing")
    with pytest.raises(EntryNotFoundError):
        call(read, "tester/present", "missing.txt")


def test_private_repository_needs_the_token(hub, call, folder):
    call(upload, "tester/private", folder, private=True)
    assert call(read, "tester/private", "notes/one.txt") == b"one"
    with pytest.raises(RepositoryNotFoundError):
        call(model_info, "tester/private", token=False)
    with pytest.raises(HfHubHTTPError, match="401"):
        call(model_info, "tester/private", token="hf_other")
    assert hub.requests[-1] == ("GET", "/api/models/tester/private", 401)


def test_model_card_is_checked_and_read(call, folder):
    call(push_card, "tester/card", "---\nlibrary_name: diffusers\ntags: [music]\n---\n# A card\n")
    info = call(model_info, "tester/card")
    assert (info.library_name, info.tags, info.card_data.tags) == ("diffusers", ["music"], ["music"])
    assert call(read, "tester/card", "README.md").endswith(b"# A card\n")
    (folder / "README.md").write_text("---\ntags: [music\n---\n")
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        call(upload, "tester/card", folder)
