"""Model folders as bad luck leaves them: each is refused in a sentence, none answers at random."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from frugalvlm import loading
from frugalvlm.checks import OptionError
from frugalvlm.loading import load_vlm, model_hash
from frugalvlm.pocket.installed import HASHES, WeightsError, models_dir, save_vlm, verify
from frugalvlm.pocket.models import build_model, build_processor

TINY = "pocket-llava-tiny"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / TINY
    save_vlm(build_model(TINY), build_processor(TINY), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def _configured(**changes):
    def harm(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            *parents, last = key.split("__")
            inner = config
            for parent in parents:
                inner = inner[parent]
            inner[last] = value(inner[last]) if callable(value) else value
        path.write_text(json.dumps(config))

    return harm


def _written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _halved(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _pickled(folder):
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()


def _added(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.other.weight"] = next(iter(weights.values())) + 1
    save_file(weights, path, metadata={"format": "pt"})


def _removed(*names):
    def harm(folder):
        for name in names:
            (folder / name).unlink()

    return harm


HARMS = {
    "half of the weights": (_halved, "does not hold a loadable model"),
    "ten bytes": (_written("model.safetensors", b"0123456789"), "does not hold a loadable model"),
    "text for weights": (_written("model.safetensors", b"no" * 99), "not hold a loadable model"),
    "no weights": (_removed("model.safetensors"), "holds no .*safetensors"),
    "a pickle": (_pickled, "pytorch_model.bin, which can run any code"),
    "a layer more": (_configured(text_config__num_hidden_layers=lambda n: n + 1), "no weights for"),
    "a layer less": (_configured(text_config__num_hidden_layers=lambda n: n - 1), "no place for"),
    "wider": (_configured(text_config__intermediate_size=lambda n: n * 2), "another shape"),
    "a tower layer more": (
        _configured(vision_config__num_hidden_layers=lambda n: n + 1), "no weights for",
    ),
    "weights too many": (_added, "no place for: model.other.weight"),
    "a layer that is not there": (_configured(vision_feature_layer=99), "reads layer 99"),
    "one too low": (_configured(vision_feature_layer=-40), "reads layer -40"),
    "one of a list": (_configured(vision_feature_layer=[1, 99]), "another shape|reads layer 99"),
    "no number for one": (
        _configured(text_config__rms_norm_eps="x"), r"rms_norm_eps': \S+",
    ),
    "heads that do not divide": (
        _configured(text_config__num_attention_heads=3), r"validate_architecture': \S+",
    ),
    "an unknown activation": (_configured(text_config__hidden_act="magic"), "'magic'"),
    "another decoder": (_configured(text_config__model_type="gpt2"), "no weights for"),
    "fewer words": (_configured(text_config__vocab_size=10), "another shape"),
    "a word for a layer": (_configured(vision_feature_layer="last"), "not hold a loadable model"),
    "another placeholder": (_configured(image_token_index=7), "puts pictures at token 7"),
    "no configuration": (_removed("config.json"), "does not hold a loadable model"),
    "an empty one": (_written("config.json", b""), "does not hold a loadable model"),
    "a list for one": (_written("config.json", b"[]"), "does not hold a loadable model"),
    "an unknown family": (_configured(model_type="bloom"), "does not hold a loadable model"),
    "no tokenizer": (
        _removed("tokenizer.json", "tokenizer_config.json", "processor_config.json"),
        "does not hold a loadable model|no processor",
    ),
    "a damaged tokenizer": (_written("tokenizer.json", b"{}"), "does not hold a loadable model"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_folder_is_refused_in_a_sentence(harm, folder):
    change, sentence = HARMS[harm]
    change(folder)
    with pytest.raises(WeightsError, match=sentence) as error:
        load_vlm(str(folder))
    assert "\n" not in str(error.value)


def test_the_unharmed_folder_loads(folder):
    model, processor = load_vlm(str(folder))
    assert processor.tokenizer.padding_side == "left"
    own = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert all(torch.equal(own[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "a b/c d",
        "../x",
        "a/b\nc",
        "a/\ud800",
        "a/\0",
        "a/b/c",
        "nonsense",
        "~",
        ".",
        "-/-",
        "a/b.git",
    ],
)
@pytest.mark.parametrize("read", [load_vlm, model_hash])
def test_what_is_no_name_of_a_model_is_refused_at_once(name, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "hub_answers", None)  # nobody may be asked
    with pytest.raises(
        WeightsError, match=r"no Hub id of the form|holds no \*\.safetensors"
    ) as error:
        read(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["int4", "", "magic", torch.int8, 16, "load", float])
def test_types_that_weights_cannot_have(dtype, folder):
    with pytest.raises(OptionError, match=r"dtype is a float type such as torch\.bfloat16"):
        load_vlm(str(folder), dtype=dtype)


def test_types_by_name(folder):
    assert load_vlm(str(folder), dtype="float16")[0].dtype == torch.float16


def test_a_kernel_that_is_not_installed_is_named(folder):
    with pytest.raises(WeightsError, match=r"FlashAttention2.*another attn_implementation"):
        load_vlm(str(folder), attn_implementation="flash_attention_2")


def test_a_refusal_prints_no_report(folder, capfd):
    _configured(text_config__num_hidden_layers=lambda n: n + 1)(folder)
    with pytest.raises(WeightsError):
        load_vlm(str(folder))
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("read", [load_vlm, model_hash])
def test_a_revision_belongs_to_the_hub(read, folder):
    with pytest.raises(WeightsError, match="is a folder, which has no revision 'main'"):
        read(str(folder), revision="main")
    with pytest.raises(WeightsError, match="is an embedded model, which has no revision 'v2'"):
        read("pocket-llava-base", revision="v2")


@pytest.mark.parametrize("where", ["on the Hub", "in the cache"])
def test_a_pickle_of_the_hub_is_refused_for_what_it_is(where, folder, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(loading, "hub_answers", lambda: where == "on the Hub")
    if where == "on the Hub":
        said = (
            "some/model does not appear to have a file named model.safetensors or "
            "model.safetensors.index.json and thus cannot be loaded with `safetensors`."
        )
        kind = loading.AutoModelForImageTextToText
        monkeypatch.setattr(kind, "from_pretrained", lambda *a, **b: _raise(OSError(said)))
    else:
        own = cache / "models--some--model"
        _pickled(folder)
        shutil.copytree(folder, own / "snapshots" / "0123")
        (own / "refs").mkdir()
        (own / "refs" / "main").write_text("0123")
    with pytest.raises(WeightsError, match=r"as pickles alone.*only safetensors are loaded"):
        load_vlm("some/model")
    monkeypatch.undo()
    monkeypatch.setattr(loading, "hub_answers", lambda: False)
    with pytest.raises(WeightsError, match="hf download some/other"):
        load_vlm("some/other")


def _raise(error):
    raise error


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b'{"a', b"\xff", b'{"config.json": 3, "model.safetensors": 4}',
     b'{"config.json": "0", "model.safetensors": "0", "../../x": "0"}', b'{"config.json": "0"}'],
)  # fmt: skip
def test_a_damaged_list_of_hashes_vouches_for_nothing(content, folder):
    (folder / HASHES).write_bytes(content)
    with pytest.raises(WeightsError, match=r"damaged.*git checkout"):
        verify(folder)


@pytest.mark.parametrize(
    "name", ["extra.safetensors", "adapter_config.json", "code.py", "added_tokens.txt", "model.bin"]
)
def test_a_file_that_no_hash_covers_is_refused(name, folder):
    (folder / name).write_bytes(b"x")
    with pytest.raises(WeightsError, match=f"{name} is no file of this model"):
        verify(folder)
    (folder / name).unlink()
    (folder / name).mkdir()  # templates, for one, are read from folders
    with pytest.raises(WeightsError, match=f"{name} is no file of this model"):
        verify(folder)


def test_cards_hidden_files_and_left_overs_are_free(folder):
    for name in (".DS_Store", "README.md", "model.safetensors.tmp"):
        (folder / name).write_bytes(b"x")
    (folder / ".ipynb_checkpoints").mkdir()
    assert "model.safetensors" in verify(folder)


def test_what_is_shipped_is_whole():
    for folder in sorted(path for path in models_dir().iterdir() if path.is_dir()):
        verify(folder)


def test_a_processor_that_needs_more_names_the_extra(folder, monkeypatch):
    def missing(*given, **options):
        raise ImportError("VideoProcessor requires the Torchvision library\nmany more lines")

    monkeypatch.setattr("frugalvlm.loading.AutoProcessor.from_pretrained", missing)
    with pytest.raises(WeightsError, match=r"Torchvision library\): .*frugalvlm\[full\]"):
        load_vlm(str(folder))
