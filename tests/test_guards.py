"""Rules that hold for the whole tree: what imports what, what the wheel holds, what no file may contain."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"actstore": "actstore", "ingest": "actstore.ingest", "query": "actstore.query"}
SOURCES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[top], *rest]).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything a file imports, at any depth of it."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, base]).strip(".")
            found |= {base, *(f"{base}.{a.name}" for a in node.names)}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_rules(path):
    imported = imports_of(path)
    top = path.relative_to(ROOT).parts[0]
    forbidden = {
        "actstore": ("actstore.ingest", "actstore.query"),
        "ingest": ("actstore.query",),
        "query": ("actstore.ingest",),
    }
    crossing = {i for i in imported for f in forbidden[top] if i == f or i.startswith(f + ".")}
    assert not crossing, f"{path} reaches across the folders"
    if "storage" not in path.parts:
        touched = {i for i in imported if i.split(".")[0] in {"fsspec", "s3fs", "gcsfs", "adlfs", "obstore"}}
        # A corpus's source is the user's own place, read once; it is not the store.
        allowed = {"fsspec", "fsspec.core", "fsspec.spec"} if path.name == "source_files.py" else set()
        assert not touched - allowed, f"{path} touches storage; only actstore.storage may"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_they_are_used(path):
    tree = ast.parse(path.read_text())
    heavy = {
        "torch",
        "ray",
        "faiss",
        "transformers",
        "scipy",
        "sklearn",
        "matplotlib",
        "datasets",
        "pandas",
        "polars",
    }
    at_top = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            at_top |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            at_top.add((node.module or "").split(".")[0])
    assert not at_top & heavy


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_unsafe_loading(path):
    unsafe = {
        ("pickle", "load"),
        ("pickle", "loads"),
        ("torch", "load"),
        ("joblib", "load"),
        ("yaml", "load"),
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            f = node.func
            if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name):
                assert (f.value.id, f.attr) not in unsafe, f"{path}:{node.lineno}"
            assert not (isinstance(f, ast.Name) and f.id in {"eval", "exec"}), f"{path}:{node.lineno}"
            for keyword in node.keywords:
                if keyword.arg in {"trust_remote_code", "allow_pickle"}:
                    assert isinstance(keyword.value, ast.Constant), f"{path}:{node.lineno}"
                    assert keyword.value.value is False, f"{path}:{node.lineno}"


def test_no_file_is_named_like_the_standard_library():
    names = {p.stem for p in SOURCES} & set(sys.stdlib_module_names)
    assert names <= {"__future__"}, names


def test_reading_needs_neither_torch_nor_ray():
    code = (
        "import sys, actstore, actstore.activations, actstore.query.examples, actstore.query.nearest, actstore.query.sql;"
        "print([m for m in ('torch', 'ray', 'transformers', 'pandas', 'faiss', 's3fs') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_question_about_a_latent_starts_light():
    """What takes long to import is imported by the questions that need it."""
    code = (
        "import sys, actstore, actstore.query.examples;"
        "heavy = 'duckdb ray torch transformers pandas matplotlib scipy faiss s3fs fsspec zarr rich pyarrow.dataset numpy.ma '"
        "'pyarrow.compute';"
        "print([m for m in heavy.split() if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_packages_are_all_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert listed == {module_of(p) for p in SOURCES if p.name == "__init__.py"}


def test_wheel_holds_every_module(tmp_path):
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    copy = tmp_path / "copy"
    for name in tracked:
        if (ROOT / name).is_file() and name.split("/")[0] in {
            *FOLDERS,
            "pyproject.toml",
            "README.md",
            "LICENSE",
        }:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(tmp_path / "dist"),
            str(copy),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {module_of(p).replace(".", "/") + ".py" for p in SOURCES if p.name != "__init__.py"}
    expected |= {module_of(p).replace(".", "/") + "/__init__.py" for p in SOURCES if p.name == "__init__.py"}
    assert expected <= inside
    assert {"actstore/FORMAT.md", "actstore/py.typed"} <= inside


def test_nothing_refers_to_where_it_was_made():
    words = ["/" + w + "/" for w in ("home", "root", "work", "mnt")] + [".." + "/shared"]
    for path in [*SOURCES, *ROOT.glob("*.md"), *ROOT.glob("examples/*.py"), ROOT / "Makefile"]:
        text = path.read_text()
        assert not [w for w in words if w in text], path
