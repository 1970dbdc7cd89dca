"""Publish a model on the Hub: weights, code, processor, card, decision files and metrics in one commit.

    python push_to_hub.py --repo_id me/au-llava
    python push_to_hub.py --model runs/mine-merged --results runs/mine-scores --repo_id me/mine --tag v1.0 --verify

The files are validated before anything is sent: in a process of its own, without this package and without a network,
a copy of them has to load and to answer all three tasks. The repository is private unless `--public` is given. Run the
command again after an interruption: what has arrived is not sent twice, and no visitor ever sees half a version.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, snapshot_download
from huggingface_hub.utils import RepositoryNotFoundError, filter_repo_objects

from au_llava.action_units import TASKS, get_task, select


# What training and evaluation leave in folders, and no visitor needs; pickles may hold code, and people have names and
# faces. A pattern's star stands for folders, too.
LEFT_OUT = [
    "*held_out.json",
    "*trained_on.json",
    "*predictions.parquet",
    "*parts-*/*",
    "*report.html",
    "*results.json",
    ".*",
    "*/.*",
    "checkpoint-*",
    "runs/*",
    "*__pycache__*",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.partial",
    "*.tmp",
]

ASK = """
import json, sys
sys.modules["au_llava"] = None  # as on a machine where the package is not installed
from PIL import Image
from transformers import pipeline

pipe = pipeline("facial-action-units", model=sys.argv[1], revision=sys.argv[2], trust_remote_code=True)
ramp = Image.linear_gradient("L").resize((224, 224))
picture = Image.merge("RGB", (ramp, Image.radial_gradient("L").resize((224, 224)), ramp.rotate(90)))
print("ANSWERS" + json.dumps([pipe(picture, task=task, detector="none")[0] for task in sys.argv[3:]]))
"""


def publish(
    model: str | Path,
    repo_id: str,
    results: str | Path | None = None,
    public: bool = False,
    revision: str = "main",
    tag: str | None = None,
    message: str = "Publish",
    verify: bool = False,
    public_licence: str | None = None,
) -> CommitInfo:
    """Validate a model's folder and put it on the Hub in one commit.

    The Hub is the one that `HF_ENDPOINT` names, and the token the one that `hf auth login` or `HF_TOKEN` gave.

    Args:
        model: The folder. Of a git checkout all tracked files are published, of any other folder all but `LEFT_OUT`.
        repo_id: `user/name`. It is made if there is none. Afterwards it holds these files and no others; older
            versions stay in its history.
        results: A folder that `evaluate_au.py` wrote; its results and report go to `results/`.
        public: Let everyone see the repository.
        revision: The branch; it is made if there is none.
        tag: A name for this version.
        message: The commit's first line.
        verify: Then load that commit from the Hub, and compare its answers to those of the folder, bit by bit.
        public_licence: What allows weights trained on BP4D, DISFA or FEAFA to be public; it is added to the card,
            unless it stands there.

    Returns:
        `CommitInfo`: `oid` is what users give as `revision`, of an adapter to `snapshot_download`. The last commit, if
        nothing has changed.

    Raises:
        FileNotFoundError: There is no such folder, or a file of it is missing.
        ValueError: The folder does not load or does not answer, the card is not valid, the repository is public and
            `public` is not given, the tag is another version's, or the card, or what training noted beside the
            weights, names a data set whose agreement keeps them private, and `public_licence` is not given.
        RuntimeError: With `verify`, the Hub's copy answers differently.
        HfHubHTTPError: The Hub refuses.
    """
    # Takes seconds: it brings PEFT, which uploading needs not.
    from au_llava.adapters import check_push, trained_on

    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder, "model")
        copy_files(Path(model), results, stage)
        check_push(trained_on([], str(model)), public, public_licence, base=None)
        card, terms = stage / "README.md", f"Published under: {public_licence}."
        if public and public_licence and terms not in card.read_text(encoding="utf-8"):  # train_sft.py writes it, too
            with card.open("a", encoding="utf-8") as file:
                file.write(f"\n\n{terms}\n")
        answers = ask(stage)
        commit = upload(stage, repo_id, public, revision, tag, message)
    if verify and ask(commit.repo_url.repo_id, commit.oid, is_adapter(model)) != answers:
        raise RuntimeError(f"{commit.commit_url} answers otherwise than {model}; compare the files.")
    return commit


def upload(
    folder: Path,
    repo_id: str,
    public: bool = False,
    revision: str = "main",
    tag: str | None = None,
    message: str = "Publish",
) -> CommitInfo:
    """Make a repository hold exactly what a folder holds, in one commit: all or nothing.

    See [`publish`], which validates the folder before.
    """
    ModelCard.load(folder / "README.md").validate()  # by the Hub, before anything is made there
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=not public, exist_ok=True).repo_id
    if not public:
        check_private(repo_id)
    elif api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} is private; make it public in its settings on the Hub, or leave --public out.")
    if revision != "main":
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    before = api.model_info(repo_id, revision=revision)
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    tagged = tags.get(tag, before.sha)
    taken = f"{repo_id}: the tag {tag} stands for {tagged} already; give another one"
    if tagged != before.sha:
        raise ValueError(f"{taken}. Nothing was uploaded.")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    old = {sibling.rfilename for sibling in before.siblings or []} - {".gitattributes", *names}
    operations: list = [CommitOperationAdd(name, folder / name) for name in names if name != "README.md"]
    operations.append(CommitOperationAdd("README.md", _for_visitors(folder / "README.md", repo_id)))
    operations += [CommitOperationDelete(name) for name in sorted(old)]
    # The Hub refuses if another commit has come in between.
    commit = api.create_commit(
        repo_id, operations, commit_message=message, revision=revision, parent_commit=before.sha
    )
    if tag in tags and commit.oid != tagged:
        raise ValueError(f"{taken}. The files are there, as {commit.oid}.")
    if tag:
        api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True)
    return commit


def _for_visitors(card: Path, repo_id: str) -> bytes:
    """A card as visitors need it: with the repository where training named its folder, which nobody else has."""

    def named(found: re.Match) -> str:
        local = found[1] != "." and Path(found[1]).is_dir()
        return f'from_pretrained("{repo_id}"' if local else found[0]

    return re.sub(r'from_pretrained\("([^"]+)"', named, card.read_text(encoding="utf-8")).encode()


def check_private(repo_id: str) -> None:
    """See that what is to stay private does not go where everyone sees it.

    Args:
        repo_id (`str`): `user/name`, or a name of one's own. There need not be such a repository yet.

    Raises:
        ValueError: The repository is public.
        HfHubHTTPError: The Hub refuses.
    """
    api = HfApi()
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    try:
        private = api.model_info(repo_id).private
    except RepositoryNotFoundError:  # it will be made, and private
        return
    if not private:
        raise ValueError(
            f"{repo_id} is public; give --public (train_sft.py: --hub_private_repo false) if everyone may see this, "
            "or another --repo_id (--hub_model_id)."
        )


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, whose base lies elsewhere, and no whole model."""
    return Path(folder, "adapter_config.json").is_file()


def ask(model: str | Path, revision: str = "main", adapter: bool = False) -> list[dict]:
    """Load a folder, or a repository at a revision, in a fresh process, and ask all three tasks about one picture.

    Args:
        model: The folder as a `Path`, or the repository's id.
        revision (`str`): Of the repository.
        adapter (`bool`): Whether the repository holds an adapter. That is downloaded first and loaded as a folder, for
            transformers would ask for the base at the adapter's revision, too.

    Returns:
        `list[dict]`: The one face of each task, as the pipeline gives it.

    Raises:
        ValueError: It does not load, or an answer is not what its task allows.
    """
    if adapter:
        model, revision = Path(snapshot_download(str(model), revision=revision)), "main"
    # A folder must hold all that it needs; only an adapter's base may come from elsewhere.
    alone = isinstance(model, Path) and not is_adapter(model)
    with tempfile.TemporaryDirectory() as away:
        environment = os.environ | {"HF_MODULES_CACHE": f"{away}/modules"} | ({"HF_HUB_OFFLINE": "1"} if alone else {})
        done = subprocess.run(
            [sys.executable, "-c", ASK, str(model), revision, *TASKS],
            cwd=away,
            env=environment,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise ValueError(f"{model}: it does not load and answer on its own:\n{done.stderr.strip()[-2000:]}")
    answers = json.loads(done.stdout.split("ANSWERS")[1])
    for task, face in zip(TASKS, answers, strict=True):
        units, allowed = face["action_units"], get_task(task).values
        whole = list(units) == [unit.code for unit in select(None, task)]
        if not whole or not all(
            unit["value"] in allowed and math.isfinite(unit["probability"]) for unit in units.values()
        ):
            raise ValueError(f"{model}: {task} gives {units}, which the task does not allow.")
    return answers


def copy_files(model: Path, results: str | Path | None, stage: Path) -> None:
    """Copy what is published into an empty folder.

    Raises:
        FileNotFoundError: There is no such folder, or a file that must be published is missing.
        ValueError: The adapter's base is a local folder, or the card's metadata is no YAML of the right form.
    """
    if not model.is_dir():
        raise FileNotFoundError(f"{model}: no such folder; give one that save_pretrained or train_sft.py wrote.")
    names = _tracked(model)
    if not names:
        every = sorted(path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file())
        names = list(filter_repo_objects(every, ignore_patterns=LEFT_OUT))
    sources = {name: model / name for name in names}
    if results:
        sources |= {f"results/{name}": Path(results, name) for name in ("results.json", "report.html")}
    for needed in ("README.md", "processor_config.json"):
        if needed not in sources:
            raise FileNotFoundError(f"{model}: no {needed}; `evaluate_au.py --update_card` begins a card, and "
                                    "`processor.save_pretrained` writes the rest.")  # fmt: skip
    for name, source in sources.items():
        if not source.is_file():
            raise FileNotFoundError(f"{source}: no such file; write it, or take it out of what is published.")
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, stage / name)
    if results:  # agreements on data sets forbid to pass pictures of their people on
        from evaluation.report import without_faces  # takes seconds: it brings the drawing

        report = stage / "results" / "report.html"
        report.write_text(without_faces(report.read_text(encoding="utf-8")), encoding="utf-8")
    if "adapter_config.json" in sources:
        base = json.loads((stage / "adapter_config.json").read_text())["base_model_name_or_path"]
        if Path(base).is_dir() or base.startswith((".", "/", "~")):
            raise ValueError(
                f"{model}: this adapter belongs to the local folder {base}, which no one else has. Publish that first "
                "and put its Hub id into adapter_config.json (base_model_name_or_path), or merge the two."
            )
    ModelCard.load(stage / "README.md")


def _tracked(folder: Path) -> list[str]:
    """The files that git tracks, if the folder is the top of a checkout.

    Raises:
        ValueError: Git refuses to say.
    """
    if not (folder / ".git").exists():
        return []
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=folder, capture_output=True, text=True)
    if listed.returncode:  # as of a checkout of another user, for which git itself says what to do
        raise ValueError(f"{folder}: git does not say what it tracks: {listed.stderr.strip()}")
    return [name for name in listed.stdout.split("\0") if name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".", help="folder of a model or an adapter")
    parser.add_argument("--repo_id", required=True, help="user/name on the Hub")
    parser.add_argument("--results", help="folder that evaluate_au.py wrote")
    parser.add_argument("--public", action="store_true", help="let everyone see it: mind the training data's licences")
    parser.add_argument("--public_licence", help="what allows weights trained on BP4D, DISFA or FEAFA to be public")
    parser.add_argument("--revision", default="main", help="branch")
    parser.add_argument("--tag", help="a name for this version, such as v1.0")
    parser.add_argument("--message", default="Publish", help="the commit's first line")
    parser.add_argument("--verify", action="store_true", help="then load it from the Hub and compare its answers")
    args = parser.parse_args()
    try:
        commit = publish(**vars(args))
    except (ValueError, OSError, RuntimeError) as error:  # what is wrong with what was asked, or with the network
        sys.exit(f"push_to_hub.py: {error}")
    how = f'revision="{commit.oid}"'
    if is_adapter(args.model):
        how = f'model=snapshot_download("{commit.repo_url.repo_id}", {how}); its base may change all the same'
    print(f"{commit.commit_url}\nLoad this version with {how}.")


if __name__ == "__main__":
    main()
