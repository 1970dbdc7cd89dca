"""Publishing and loading, against a Hub on loopback that speaks the real one's API over real sockets."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hub_server import TOKEN, USER, Hub

from evaluation.report import FACES


# The client runs in a process of its own: it reads the Hub's address when huggingface_hub is imported.
UPLOAD = """
import json, sys
from pathlib import Path
from push_to_hub import upload
print(upload(Path(sys.argv[1]), *json.loads(sys.argv[2])).oid)
"""
CHECK = "import sys; from push_to_hub import check_private; check_private(sys.argv[1])"
DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download("me/au", revision=sys.argv[1], local_dir=sys.argv[2]))
"""
CARD = "---\nlibrary_name: transformers\nlicense: apache-2.0\npipeline_tag: image-text-to-text\n---\n# A model\n"


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


def start(hub, home, *command) -> subprocess.Popen:
    environment = os.environ | hub.environment(home) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(hub, home, *command) -> tuple[int, str, str]:
    process = start(hub, home, *command)
    out, error = process.communicate(timeout=900)
    return process.returncode, out.strip(), error


def upload(hub, home, folder, *arguments) -> str:
    """The commit's id, or an assertion error with what the client said."""
    code, out, error = run(hub, home, "-c", UPLOAD, folder, json.dumps(arguments))
    assert code == 0, error
    return out


@pytest.fixture
def folder(tmp_path):
    """Something of every kind that is published, small, and one large file in two versions of itself."""
    made = tmp_path / "model"
    (made / "docs").mkdir(parents=True)
    (made / "README.md").write_text(CARD)
    (made / "config.json").write_text("{}")
    (made / "docs" / "page.md").write_text("words\r\nand Ünïcode")
    (made / "empty.txt").write_bytes(b"")
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (made / "adapter.safetensors").write_bytes(b"other weights")
    return made


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_goes_up_comes_down_and_a_second_time_nothing_moves(hub, folder, tmp_path):
    first = upload(hub, tmp_path / "home", folder, "me/au", False, "main", "v1")
    repository = hub.repository("me/au")
    assert repository.private and repository.tags == {"v1": first} and repository.branches == {"main": first}
    # The storage, another server, is not told the token.
    assert not any(token for _, path, token in hub.requests if path.startswith("/storage"))

    before = len(hub.requests)
    assert upload(hub, tmp_path / "home", folder, "me/au", False, "main", "v1") == first
    assert len(repository.commits) == 2  # the one that made the repository, and ours
    assert not [line for line in hub.requests[before:] if line[0] == "PUT" or "/commit/" in line[1]]

    (folder / "model.safetensors").write_bytes(b"new weights")
    (folder / "docs" / "page.md").unlink()
    second = upload(hub, tmp_path / "home", folder, "me/au")
    assert set(repository.find("main").files) == {".gitattributes", *contents(folder)}

    for revision, expected in ((second, contents(folder)), ("v1", None)):
        code, out, error = run(hub, tmp_path / "other", "-c", DOWNLOAD, revision, tmp_path / revision)
        assert code == 0, error
        got = contents(tmp_path / revision)
        del got[".gitattributes"]
        if expected:
            assert got == expected
        else:
            assert got["model.safetensors"] == hashlib.sha256(bytes(range(256)) * 1000).hexdigest()
            assert "docs/page.md" in got


@pytest.mark.parametrize("place", ["PUT /storage/*", "POST */commit/*"])
def test_a_killed_upload_shows_nothing_and_goes_on(place, hub, folder, tmp_path):
    hub.stall = place
    process = start(hub, tmp_path / "home", "-c", UPLOAD, folder, '["me/au"]')
    assert hub.stalled.wait(120)
    process.kill()
    process.communicate()
    repository = hub.repository("me/au")
    assert list(repository.find("main").files) == [".gitattributes"]  # no visitor sees half of it

    hub.stall, before = "", len(hub.storage)
    oid = upload(hub, tmp_path / "home", folder, "me/au")
    assert set(repository.find(oid).files) == {".gitattributes", *contents(folder)}
    stored = {blob.sha256 for blob in repository.find(oid).files.values() if blob.large}
    assert stored == set(hub.storage)
    sent = [path for method, path, _ in hub.requests if method == "PUT"]
    assert len(sent) - len(set(sent)) <= len(stored) - before  # what had arrived was not sent again


def test_refusals_are_told_and_nothing_is_lost(hub, folder, tmp_path):
    def refused(*arguments) -> str:
        with pytest.raises(AssertionError) as caught:
            upload(hub, tmp_path / "home", folder, *arguments)
        return str(caught.value)

    upload(hub, tmp_path / "home", folder, "me/au", True, "main", "v1")
    assert "me/au is public; give --public" in refused("me/au")
    (folder / "config.json").write_text('{"changed": 1}')
    # Whether anything changes shows only when it is committed; that the tag stands for an older commit, before.
    assert "The files are there" in refused("me/au", True, "main", "v1")
    assert len(hub.repository("me/au").commits) == 3
    (folder / "config.json").write_text('{"changed": 2}')
    assert "Nothing was uploaded" in refused("me/au", True, "main", "v1")
    assert len(hub.repository("me/au").commits) == 3
    (folder / "README.md").write_text(CARD.replace("apache-2.0", '"no such: licence!"'))
    commits = len(hub.repository("me/au").commits)
    assert '"license"' in refused("me/au", True) and '"license"' in refused("me/other")
    assert ("model", "me/other") not in hub.repositories
    (folder / "README.md").write_text(CARD)
    hub.refuse = "POST /api/repos/create"
    assert "403" in refused("me/other")
    assert len(hub.repository("me/au").commits) == commits and ("model", "me/other") not in hub.repositories


def test_a_public_repository_is_told_by_its_full_name_and_none_is_made(hub, folder, tmp_path):
    upload(hub, tmp_path / "home", folder, f"{USER}/seen", True)
    upload(hub, tmp_path / "home", folder, f"{USER}/hidden")
    made = set(hub.repositories)
    for name in ("seen", f"{USER}/seen"):
        code, _, error = run(hub, tmp_path / "home", "-c", CHECK, name)
        assert code != 0 and f"ValueError: {USER}/seen is public; give --public" in error
    with pytest.raises(AssertionError, match=f"{USER}/hidden is private; make it public in its settings"):
        upload(hub, tmp_path / "home", folder, f"{USER}/hidden", True)
    for name in ("hidden", f"{USER}/hidden", "none", f"{USER}/none"):
        code, _, error = run(hub, tmp_path / "home", "-c", CHECK, name)
        assert code == 0, error
    assert set(hub.repositories) == made


def test_a_card_says_how_visitors_load_the_model(hub, folder, tmp_path):
    here = f'from_pretrained("{folder}", trust_remote_code=True)'
    (folder / "README.md").write_text(f'{CARD}\n{here}\nfrom_pretrained(".")\npython train_sft.py --output {folder}\n')
    commit = upload(hub, tmp_path / "home", folder, "me/au")
    code, _, error = run(hub, tmp_path / "other", "-c", DOWNLOAD, commit, tmp_path / "got")
    assert code == 0, error
    card = (tmp_path / "got" / "README.md").read_text()
    assert 'from_pretrained("me/au", trust_remote_code=True)\nfrom_pretrained(".")' in card and here not in card
    assert f"--output {folder}" in card and here in (folder / "README.md").read_text()


def test_the_folder_is_checked_before_anything_is_sent(tmp_path, folder):
    sys.path.insert(0, str(ROOT))
    from push_to_hub import copy_files

    with pytest.raises(FileNotFoundError, match=r"no such folder"):
        copy_files(tmp_path / "nowhere", None, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"processor_config\.json"):
        copy_files(folder, None, tmp_path / "b")
    (folder / "processor_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        copy_files(folder, tmp_path, tmp_path / "c")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "docs" / ".hidden").write_text("a secret")
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "optimizer.pt").write_bytes(b"pickle")
    # People's names, faces and answers, wherever in the folder they were written.
    people = {
        "held_out.json",
        "scores/predictions.parquet",
        "scores/validation/predictions.parquet",
        "scores/report.html",
    }
    people |= {"trained_on.json", "adapter/trained_on.json", "scores/parts-12ab/000001.parquet", "scores/results.json"}
    for name in people:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"mine": ["Anna"]}')
    copy_files(folder, None, tmp_path / "d")
    left_out = {"training_args.bin", "docs/.hidden", "checkpoint-7/optimizer.pt", *people}
    assert set(contents(tmp_path / "d")) == set(contents(folder)) - left_out
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ValueError, match="Publish that first"):
        copy_files(folder, None, tmp_path / "e")
    (folder / "adapter_config.json").unlink()
    (folder / "README.md").write_text("---\nmodel-index: 5\n---\n")
    with pytest.raises(ValueError, match=r"(?i)model-index|metadata"):
        copy_files(folder, None, tmp_path / "f")


def test_weights_of_restricted_data_stay_private_without_a_licence(tmp_path, folder, monkeypatch):
    import push_to_hub

    (folder / "processor_config.json").write_text("{}")
    (folder / "README.md").write_text(CARD.replace("---\n#", "datasets: [bp4d, own]\n---\n#"))
    cards: list[str] = []
    monkeypatch.setattr(push_to_hub, "ask", lambda stage: cards.append((stage / "README.md").read_text()))
    monkeypatch.setattr(push_to_hub, "upload", lambda *arguments: arguments)
    with pytest.raises(ValueError, match=r"trained on BP4D .* --public_licence"):
        push_to_hub.publish(folder, "me/au", public=True)
    assert not cards  # refused before anything else
    push_to_hub.publish(folder, "me/au")
    push_to_hub.publish(folder, "me/au", public=True, public_licence="consent of 1 May 2026")
    assert ["consent of 1 May 2026" in card for card in cards] == [False, True]
    (folder / "README.md").write_text(cards[1])  # as a card of train_sft.py has it
    push_to_hub.publish(folder, "me/au", public=True, public_licence="consent of 1 May 2026")
    push_to_hub.publish(folder, "me/au", public=True, public_licence="consent of 2 May 2026")
    assert cards[2] == cards[1] and "Published under: consent of 2 May 2026." in cards[3]
    (folder / "README.md").write_text(CARD)  # one that someone wrote, and who was trained on is still known
    (folder / "trained_on.json").write_text('{"disfa": ["SN001"]}')
    with pytest.raises(ValueError, match=r"trained on DISFA .* --public_licence"):
        push_to_hub.publish(folder, "me/au", public=True)


def test_a_checkout_publishes_what_git_tracks(tmp_path):
    from push_to_hub import copy_files

    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    copy_files(ROOT, None, tmp_path / "stage")
    names = set(contents(tmp_path / "stage"))
    assert {"config.json", "model.safetensors", "README.md", "pipeline_au_llava.py", "LICENSE"} <= names
    assert "metrics/au_detection/au_detection.py" in names
    assert not [name for name in names if name.startswith((".git/", ".venv/", "runs/"))]


def test_a_checkout_of_which_git_tells_nothing_is_one_clear_error(folder, tmp_path):
    from push_to_hub import copy_files

    (folder / ".git").write_text("gitdir: nowhere")
    with pytest.raises(ValueError, match="model: git does not say what it tracks: fatal: "):
        copy_files(folder, None, tmp_path / "stage")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """A tiny model's folder with a card."""
    import copy

    from conftest import tiny_model

    from au_llava import AuLlavaProcessor

    made = tmp_path_factory.mktemp("trained")
    tiny_model(copy.deepcopy(tokenizer)).save_pretrained(made)
    AuLlavaProcessor.from_backbones(None, copy.deepcopy(tokenizer), patch_size=56).save_pretrained(made)
    (made / "README.md").write_text(CARD)
    return made


@pytest.mark.slow
def test_the_whole_way_there_and_back(hub, trained, tmp_path):
    """Published by the command, verified by it, and answered bit for bit the same by `revision`."""
    from push_to_hub import ASK, ask

    results = tmp_path / "evaluation"
    results.mkdir()
    (results / "results.json").write_text("{}")
    face = f"<details><summary>{FACES}</summary><img src='data:image/jpeg;base64,AAAA' alt='faces'></details>"
    (results / "report.html").write_text(f"<p>figures</p>{face}<p>more</p>{face}")
    command = ["push_to_hub.py", "--model", trained, "--repo_id", f"{USER}/au", "--results", results, "--verify"]
    code, out, error = run(hub, tmp_path / "home", *command, "--tag", "v1")
    assert code == 0, error
    oid = hub.repository(f"{USER}/au").tags["v1"]
    assert f'revision="{oid}"' in out
    published = set(hub.repository(f"{USER}/au").find(oid).files)
    assert {"results/results.json", "model.safetensors", "modeling_au_llava.py", "decision.json"} <= published
    code, _, error = run(hub, tmp_path / "home", "-c", DOWNLOAD, oid, tmp_path / "there")
    assert code == 0, error
    report = (tmp_path / "there" / "results" / "report.html").read_text()
    assert report == "<p>figures</p><p>more</p>", "the people in a data set's pictures stay at home"

    expected = ask(trained)
    # A later version with other weights does not change what the first one answers.
    changed = tmp_path / "changed"
    shutil.copytree(trained, changed)
    from safetensors.torch import load_file, save_file

    weights = load_file(changed / "model.safetensors")
    save_file(
        {name: weight.flip(0) for name, weight in weights.items()}, changed / "model.safetensors", {"format": "pt"}
    )
    code, _, error = run(hub, tmp_path / "home", "push_to_hub.py", "--model", changed, "--repo_id", f"{USER}/au")
    assert code == 0, error
    tasks = [face["task"] for face in expected]
    for revision, same in ((oid, True), ("v1", True), ("main", False)):
        code, out, error = run(hub, tmp_path / revision, "-c", ASK, f"{USER}/au", revision, *tasks)
        assert code == 0, error
        assert (json.loads(out.split("ANSWERS")[1]) == expected) is same

    # A stranger without the token sees nothing of a private repository.
    environment = hub.environment(tmp_path / "stranger")
    assert environment.pop("HF_TOKEN") == TOKEN
    stranger = subprocess.run(
        [sys.executable, "-c", ASK, f"{USER}/au", "main", *tasks],
        env={name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert stranger.returncode != 0 and "me/au" in stranger.stderr


@pytest.mark.slow
def test_an_adapter_is_verified_and_loaded_by_its_commit(hub, trained, tmp_path):
    from peft import LoraConfig, get_peft_model

    from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor

    code, _, error = run(hub, tmp_path / "home", "push_to_hub.py", "--model", trained, "--repo_id", f"{USER}/base")
    assert code == 0, error
    base = AuLlavaForConditionalGeneration.from_pretrained(trained)
    adapter = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapter.peft_config["default"].base_model_name_or_path = f"{USER}/base"
    adapter.save_pretrained(tmp_path / "adapter")
    AuLlavaProcessor.from_pretrained(trained).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text(CARD)
    command = ["push_to_hub.py", "--model", tmp_path / "adapter", "--repo_id", f"{USER}/adapter", "--tag", "v1"]
    code, out, error = run(hub, tmp_path / "home", *command, "--verify")
    assert code == 0, error
    oid = hub.repository(f"{USER}/adapter").tags["v1"]
    assert f'model=snapshot_download("{USER}/adapter", revision="{oid}"); its base may change' in out


@pytest.mark.slow
def test_a_broken_model_is_not_published(hub, trained, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    (broken / "readout_au_llava.py").unlink()
    code, _, error = run(hub, tmp_path / "home", "push_to_hub.py", "--model", broken, "--repo_id", "me/au")
    assert code != 0 and "does not load and answer on its own" in error
    assert not hub.requests
