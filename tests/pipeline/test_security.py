"""What docs/security.md promises: nothing that is read is run, and nothing that is read reaches a shell, a file name,
a terminal or a page as more than text."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from click.testing import CliRunner

from kdpipe.data.errors import KdpipeError, ManifestError, ModelError
from kdpipe.data.hashing import Fingerprints
from kdpipe.data.manifest import load_manifest
from kdpipe.pipeline.cli import main
from kdpipe.pipeline.plan import STAGES, make_plans
from kdpipe.pipeline.runner import Request
from kdpipe.stages.config import ModelConfig
from kdpipe.stages.models.folder import resolve

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for room in ("data", "pipeline", "stages") for path in (ROOT / room).rglob("*.py"))
ESCAPES = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202e"


def nodes(kind: type[Any]) -> Iterator[tuple[str, Any]]:
    """All nodes of a kind in kdpipe's own code, with their place."""
    for path, nodes_of in parsed().items():
        for node in nodes_of:
            if isinstance(node, kind):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


@lru_cache(maxsize=1)
def parsed() -> dict[Path, list[Any]]:
    assert len(SOURCES) > 80
    return {path: list(ast.walk(ast.parse(path.read_text(encoding="utf-8")))) for path in SOURCES}


def calls() -> Iterator[tuple[str, str, dict[str, ast.expr]]]:
    for where, node in nodes(ast.Call):
        yield where, ast.unparse(node.func), {word.arg or "**": word.value for word in node.keywords}


def test_no_module_that_runs_what_it_reads_is_imported() -> None:
    forbidden = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "pty", "code"}
    found = [(where, name.name) for where, node in nodes(ast.Import) for name in node.names]
    found += [(where, node.module or "") for where, node in nodes(ast.ImportFrom)]
    assert not [(where, name) for where, name in found if name.split(".")[0] in forbidden]


def _is_false(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def test_no_call_runs_text_or_unpickles() -> None:
    never = re.compile(
        r"(eval|exec|compile|__import__|os\.(system|popen|exec\w*|spawn\w*)|subprocess\.(getoutput|getstatusoutput)"
        r"|yaml\.(load|load_all|full_load\w*|unsafe_load\w*|dump)|torch\.(load|save)|np\.load"
        r"|(dist\.)?\w*(gather_object|broadcast_object_list|scatter_object_list|send_object_list)|importlib\.import_module)"
    )
    plain = [found for found in calls() if not (found[1] == "np.load" and _is_false(found[2].get("allow_pickle")))]
    assert not [(where, name) for where, name, _ in plain if never.fullmatch(name)]
    forbidden = ("shell", "allow_pickle", "weights_only")
    assert not [(where, word) for where, _, words in plain for word in words if word in forbidden]
    loaders = [base for _, node in nodes(ast.ClassDef) for base in map(ast.unparse, node.bases) if "Loader" in base]
    assert loaders == ["yaml.SafeLoader"]


def test_remote_code_is_trusted_where_the_model_says_so_and_nowhere_else() -> None:
    asked = []
    for where, name, keywords in calls():
        loads = name.endswith(("from_pretrained", "from_config")) and name.split(".")[0].startswith(
            ("Auto", "_CLASSES")
        )
        if loads or name == "EngineArgs":
            assert {"trust_remote_code", "**"} & keywords.keys(), f"{where}: {name} leaves it to the library"
        if "trust_remote_code" in keywords:
            asked.append(where.split(":")[0])
            assert ast.unparse(keywords["trust_remote_code"]) in ("trust", "folder.settings.trust_remote_code"), where
    assert {"stages/models/loaded.py", "stages/models/launch.py", "stages/models/inputs.py"} <= set(asked)
    assert not ModelConfig("x").trust_remote_code


def test_remote_code_is_in_the_key(family: Miniatures, tmp_path: Path) -> None:
    shutil.copytree(family.teacher, tmp_path / "model")
    prints = Fingerprints()

    def key(trust: bool) -> str:
        return resolve(ModelConfig("model", trust_remote_code=trust), tmp_path).digest(prints)

    plain, trusted = key(False), key(True)
    assert plain != trusted
    (tmp_path / "model" / "code.py").write_text("x = 1")
    assert key(False) == plain and key(True) != trusted


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_pickled_weights_are_refused_and_not_opened(family: Miniatures, tmp_path: Path) -> None:
    from kdpipe.stages.models.loaded import load_model

    mark = tmp_path / "mark"
    for name in ("alone", "beside"):
        shutil.copytree(family.teacher, tmp_path / name)
        for file in ("pytorch_model.bin", "model.pt", "adapter_model.bin", "training_args.bin"):
            (tmp_path / name / file).write_bytes(pickle.dumps(Evil(mark)))
    for path in (tmp_path / "alone").glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(resolve(ModelConfig("alone", dtype="float32"), tmp_path), device="cpu")
    load_model(resolve(ModelConfig("beside", dtype="float32"), tmp_path), device="cpu")
    assert not mark.exists()
    pickle.loads((tmp_path / "beside" / "model.pt").read_bytes())
    assert mark.exists(), "the pickle does nothing, so the test shows nothing"


@pytest.mark.parametrize("trust", [False, True])
def test_code_beside_a_model_runs_only_where_it_is_asked_for(family: Miniatures, tmp_path: Path, trust: bool) -> None:
    """In a process of its own: transformers keeps modules it has once imported."""
    shutil.copytree(family.teacher, tmp_path / "model")
    mark = tmp_path / "mark"
    code = (
        f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\nfrom transformers import PreTrainedTokenizerFast as T\n"
    )
    (tmp_path / "model" / "evil.py").write_text(code)
    maps: dict[str, Any] = {"tokenizer_config.json": {"AutoTokenizer": [None, "evil.T"]}}
    if not trust:  # where it is asked for, the model would have to be one
        maps["config.json"] = {"AutoConfig": "evil.T", "AutoModelForCausalLM": "evil.T"}
        maps["processor_config.json"] = {"AutoProcessor": "evil.T"}
        maps["preprocessor_config.json"] = {"AutoFeatureExtractor": "evil.T"}
    for name, about in maps.items():
        file = tmp_path / "model" / name
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, "auto_map": about}))
    script = f"""
from pathlib import Path
from kdpipe.stages.config import ModelConfig
from kdpipe.stages.models.folder import resolve
from kdpipe.stages.models.inputs import Encoder
from kdpipe.stages.models.loaded import load_model
folder = resolve(ModelConfig("model", dtype="float32", trust_remote_code={trust}), Path({str(tmp_path)!r}))
Encoder(folder)
if not {trust}:
    load_model(folder, device="cpu")
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert mark.exists() == trust


def test_a_chat_template_cannot_reach_python(family: Miniatures, tmp_path: Path) -> None:
    from kdpipe.stages.models.inputs import Encoder
    from kdpipe.stages.models.prompt import messages, render

    shutil.copytree(family.teacher, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    tokenizer = Encoder(resolve(ModelConfig("model"), tmp_path)).tokenizer
    with pytest.raises(ModelError, match=r"the chat template cannot be applied .*unsafe"):
        tokenizer.chat_template = (tmp_path / "model" / "chat_template.jinja").read_text()
        render(tokenizer, messages("hello"))


def test_weights_outside_the_model_folder_are_refused(family: Miniatures, tmp_path: Path) -> None:
    from kdpipe.stages.models.folder import shards

    shutil.copytree(family.teacher, tmp_path / "model")
    for name in ("../other.safetensors", "/etc/passwd", "pytorch_model.bin", "..", "sub/x.safetensors"):
        index = {"weight_map": {"lm_head.weight": name}}
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match="no safetensors file beside it"):
            shards(tmp_path / "model")


def test_parquet_extension_types_are_not_unpickled(tmp_path: Path) -> None:
    about = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Evil(tmp_path / "mark")),
    }
    field = pa.field("question", pa.string(), metadata=about)
    table = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array(["?"])], schema=pa.schema([pa.field("id", pa.string()), field])
    )
    pq.write_table(table, tmp_path / "m.parquet")
    assert load_manifest(tmp_path / "m.parquet").samples[0].question == "?"
    assert not (tmp_path / "mark").exists()


def test_a_saved_dataset_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    import datasets

    for name in ("inside", "outside"):
        datasets.Dataset.from_list([{"id": name}]).save_to_disk(str(tmp_path / name))
    state = tmp_path / "inside" / "state.json"
    said = json.loads(state.read_text())
    for name in ("../outside/data-00000-of-00001.arrow", str(tmp_path / "outside" / "data-00000-of-00001.arrow")):
        state.write_text(json.dumps({**said, "_data_files": [{"filename": name}]}))
        with pytest.raises(ManifestError, match="does not lie in it"):
            load_manifest(tmp_path / "inside")
    both = tmp_path / "both"
    both.mkdir()
    (both / "dataset_dict.json").write_text('{"splits": ["../outside"]}')
    with pytest.raises(ManifestError, match="does not lie in it"):
        load_manifest(both)


IDS = [
    "../../escaped",
    "/abs/olute",
    "$(touch pwned)`touch pwned`",
    "-rf",
    "a;touch pwned",
    f"x{ESCAPES}",
    "c:\\d",
    "..",
    "é" * 300,
]
TRACE = (
    "<THINK><PLANNING>Listen.</PLANNING><CAPTION>tones</CAPTION><REASONING>2</REASONING><SUMMARY>2</SUMMARY></THINK>"
    "<RESPONSE>2</RESPONSE>"
)


@pytest.fixture(scope="module")
def hostile(family: Miniatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of samples with hostile ids, questions, tasks and file names, up to the teacher store."""
    base = tmp_path_factory.mktemp("hostile") / "run"
    base.mkdir()
    soundfile.write(base / "0.wav", 0.3 * np.sin(np.arange(12_000) / 9), 16_000)
    more = {"description": f"tones {ESCAPES}", "trace": TRACE, "task": f"t{ESCAPES}", "split": "train"}
    rows = [{"id": name, "audio": "0.wav", "question": f"? {ESCAPES} $(touch pwned)", **more} for name in IDS]
    rows.append({"id": "bad", "audio": f"{ESCAPES}.wav", "question": "?", **more})
    rows.append({"id": "test", "audio": "0.wav", "question": "?", "answer": "2", "split": "test"})
    (base / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (base / "kdpipe.yaml").write_text(f"""
data: {{manifest: manifest.jsonl, max_reject_fraction: 0.5}}
student: {{model: {{path: {family.qwen2_5_omni}, dtype: float32}}}}
teachers: {{textual: {{model: {{path: {family.teacher}, dtype: float32}}}}, k: 4, device: cpu}}
train: {{device: cpu}}
""")
    for stage in ("textualize", "cache-teachers"):
        ctx = Request(base / "kdpipe.yaml").context()
        STAGES[stage].run(ctx, make_plans(ctx, stage)[stage].todo)
    return base


def test_ids_are_in_files_and_never_their_names(hostile: Path) -> None:
    names = {path.name for path in hostile.rglob("*")} | {path.name for path in hostile.parent.iterdir()}
    assert all(re.fullmatch(r"[a-zA-Z0-9._-]+", name) for name in names), names
    assert not [name for name in names if "pwned" in name or "escaped" in name or name == "-rf"]
    held = {row.id for row in Request(hostile / "kdpipe.yaml").context().ledger("cache-teachers").rows()}
    assert held == set(IDS)


@pytest.mark.parametrize(
    "words",
    [
        ("check",),
        ("status",),
        ("status", "--json"),
        ("status", "--why", "bad"),
        ("status", "--why", IDS[5]),
        ("status", "--why", f"nobody{ESCAPES}"),
        ("cache", "inspect"),
        ("cache", "inspect", IDS[5]),
        ("cache", "verify"),
        ("cache", "gc", "--dry-run"),
        ("train", "--dry-run"),
        ("check", "--set", f"train.task_weights={{nobody: {{sft: 2}}, '{'t' * 3}': {{sft: 1}}}}"),
        ("check", "--set", "data.train_split=x"),
    ],
)
def test_nothing_that_a_terminal_obeys_is_printed(hostile: Path, words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, [*words, "-c", str(hostile / "kdpipe.yaml")])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.output.strip()
    assert not [char for char in result.output if not char.isprintable() and char != "\n"], result.output


def test_what_is_to_be_copied_into_a_shell_is_quoted(hostile: Path) -> None:
    setting = "student.system=$(touch pwned); `x` 'y'"
    result = CliRunner().invoke(main, ["status", "-c", str(hostile / "kdpipe.yaml"), "--set", setting])
    line = next(line for line in result.output.splitlines() if line.startswith("Next: "))
    assert setting in shlex.split(line.removeprefix("Next: ").split("   (or")[0])


def test_a_terminal_that_knows_ascii_alone_is_served(hostile: Path) -> None:
    command = [sys.executable, "-c", "from kdpipe.pipeline.cli import main; main()", "status", "--why", IDS[-1]]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=hostile, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "student" in done.stdout and not done.stderr, done.stderr


def test_errors_of_a_stage_process_are_escaped_too(hostile: Path, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps({"id": "a", "audio": f"/{ESCAPES}", "question": "?"}))
    command = [sys.executable, "-m", "kdpipe.pipeline.worker", "textualize", str(hostile / "kdpipe.yaml")]
    command.append(f"data.manifest={tmp_path / 'm.jsonl'}")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "leaves the manifest's folder" in done.stderr
    assert not [char for char in done.stderr if not char.isprintable() and char != "\n"], done.stderr


def test_the_model_card_shows_names_and_prompts_as_text(family: Miniatures, tmp_path: Path) -> None:
    from kdpipe.stages.train.card import fenced, plain

    name = "<img src=x onerror=alert(1)> [a](javascript:b) `c`\n# title | cell"
    assert plain(name) == r"\<img src=x onerror=alert(1)> \[a\](javascript:b) \`c\` # title \| cell"
    begin, text, end = fenced("```\n<script>\n````", "json")
    assert begin == "`````json" and end == "`````" and text.startswith("```")


def test_errors_of_the_user_are_of_one_family() -> None:
    from kdpipe.data import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__name__.endswith("Error")]
    assert len(kinds) > 6 and all(issubclass(kind, KdpipeError) for kind in kinds)
