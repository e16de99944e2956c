"""How the C kernel gets into a wheel, or a clone; and how it does not."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
hatch_build = pytest.importorskip("hatch_build", reason="not in a clone, nor in what an sdist holds")
tags = pytest.importorskip("packaging.tags")
ROOT = Path(hatch_build.__file__).parent
BY_COMPILER = pytest.mark.skipif(not hatch_build.compiler(), reason="needs a C compiler")


class App:
    def __init__(self):
        self.said = []

    def display_warning(self, words):
        self.said.append(words)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone of nothing but the source, in an environment without settings."""
    for name in ("FUNCAVG_KERNEL", "CC", "CFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hatch_build, "FLAGS", hatch_build.FLAGS.replace("-O3", "-O1"))  # sooner built
    (tmp_path / hatch_build.SOURCE).mkdir(parents=True)
    for source in (ROOT / hatch_build.SOURCE).glob("*.[ch]"):
        shutil.copy(source, tmp_path / hatch_build.SOURCE)
    return tmp_path


def built(clone, version="standard"):
    """Return what the wheel is told, and what the user is."""
    app, data = App(), {"force_include": {}}
    hook = hatch_build.KernelHook(str(clone), {}, None, None, str(clone / "dist"), "wheel", app)
    hook.initialize(version, data)
    left = [path.name for path in (clone / hatch_build.SOURCE).iterdir() if path.suffix != ".so"]
    assert sorted(left) == ["kernel.c", "kernel.h", "wires.c"]
    files = {Path(path).is_file(): place for path, place in data.pop("force_include").items()}
    return files, data, app.said


PURE = ({}, {})  # no file more, and the tag of all platforms


@BY_COMPILER
@pytest.mark.parametrize("setting", ["", "REQUIRE"])
def test_a_wheel_with_the_kernel_is_one_that_pip_takes(setting, clone, monkeypatch):
    monkeypatch.setenv("FUNCAVG_KERNEL", setting)
    files, data, said = built(clone)
    assert (files, said) == ({True: hatch_build.LIBRARY}, [])
    assert data["pure_python"] is False
    assert data["tag"] in set(map(str, tags.sys_tags()))
    assert not (clone / hatch_build.LIBRARY).exists()


@BY_COMPILER
def test_flags_of_others_are_not_heard_and_those_of_cc_are(clone, monkeypatch):
    monkeypatch.setenv("CFLAGS", "-ffast-math --no-such-flag")
    monkeypatch.setenv("CC", f"{hatch_build.compiler()[0]} -O1 -DUNUSED='a b'")
    assert built(clone)[0] == {True: hatch_build.LIBRARY}


FAILURES = {
    "false": "failed",
    "no-such-compiler": "No such file",
    "sh -c 'while [ $1 != -o ]; do shift; done; echo no library > $2'": "cannot use",
    "gcc -ffast-math": "means would not be rounded right",
    "gcc -funsafe-math-optimizations": "its mean of .* is",
}


@pytest.mark.parametrize("command", ["", *FAILURES])
def test_without_a_compiler_that_does_funcavg_goes_without(command, clone, monkeypatch):
    if command.startswith("gcc") and not shutil.which("gcc"):
        pytest.skip("needs gcc")
    if command:
        monkeypatch.setenv("CC", command)
    else:
        monkeypatch.setenv("PATH", str(clone))
    files, data, (said,) = built(clone)
    assert (files, data) == PURE
    with pytest.raises(AssertionError, match=FAILURES.get(command, "no C compiler was found")):
        raise AssertionError(said)
    monkeypatch.setenv("FUNCAVG_KERNEL", "require")
    with pytest.raises(RuntimeError, match=r"(?s)FUNCAVG_KERNEL=require, but the C kernel was not built: ."):
        built(clone)


def test_settings(clone, monkeypatch):
    monkeypatch.setenv("FUNCAVG_KERNEL", "off")
    assert built(clone) == (*PURE, [])
    monkeypatch.setenv("FUNCAVG_KERNEL", "on")
    with pytest.raises(ValueError, match="FUNCAVG_KERNEL must be off or require, or not be set, got 'on'"):
        built(clone)


@BY_COMPILER
@pytest.mark.parametrize(("name", "value"), [("FUNCAVG_KERNEL", "off"), ("CC", "false")])
def test_a_clone_does_not_keep_a_kernel_that_was_not_built_anew(name, value, clone, monkeypatch):
    files, data, said = built(clone, "editable")
    assert (files, said) == ({}, [])
    assert data["pure_python"] is False
    assert (clone / hatch_build.LIBRARY).exists()
    monkeypatch.setenv(name, value)
    assert built(clone, "editable")[:2] == PURE
    assert not (clone / hatch_build.LIBRARY).exists()
