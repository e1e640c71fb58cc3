"""The READMEs: commands are understood, links lead somewhere, numbers are those of their sources."""
import contextlib
import functools
import importlib
import io
import re
import shlex

import pytest
import tiny
from test_benchmarks import find, metrics_by_title

PAGES = {name: (tiny.ROOT / name).read_text() for name in (
    "README.md", "examples/README.md", "benchmarks/README.md")}
SCRIPT = re.compile(r"(?:python3?|torchrun(?: [^ ]+)*?) (sft|rm|dpo|ppo|predict)\.py(?=\s|$)(.*)")


def commands(page):
    """→ (script, its arguments, whether the command is complete) of each command in a page"""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`((?:python |torchrun )?(?:sft|rm|dpo|ppo|predict)\.py [^`]*)`", page)
    lines += [text if text.startswith(("python ", "torchrun ")) else f"python {text}"
              for text in (text.replace("\n", " ") for text in inline)]
    for script, rest in (found for line in lines for found in SCRIPT.findall(line)):
        yield script, [word for word in shlex.split(rest.split("&&")[0]) if word != "…"], "…" not in rest


@functools.cache
def options(script):
    """The options that a script's --help names."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        tiny.arguments(script, "--help")
    return {*re.findall(r"^  (--\w+)", text.getvalue(), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page):
    """Complete ones are parsed as the script does; of shortened ones every option exists."""
    found = [*commands(PAGES[page])]
    assert found or page.startswith("benchmarks")
    for script, argv, complete in found:
        unknown = {word for word in argv if word.startswith("--")} - options(script)
        assert not unknown, (script, argv)
        if complete and "--model" in argv:
            tiny.arguments(script, *argv)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = (tiny.ROOT / page).parent / path
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert anchor in anchors, link


def test_results_are_those_of_the_study():
    """Each row of the README's table is the beginning of a row of examples/README.md."""
    def rows(page):
        table = re.findall(r"^\| (\w[^|]*?) \|(.*± .*)\|$", PAGES[page], re.MULTILINE)
        return {name.split(",")[0]: [*map(str.strip, cells.split("|"))] for name, cells in table[::-1]}
    study = {name: cells[1:4] for name, cells in rows("examples/README.md").items() if len(cells) > 4}
    short = rows("README.md")
    assert len(short) >= 6 and all(study[name] == cells for name, cells in short.items()), (short, study)


def test_memory_is_what_memory_py_computes(tmp_path):
    """GB of a 7B; and the table in benchmarks/README.md."""
    find()
    memory = importlib.import_module("memory")
    memory.llava_config(*memory.SIZES["LLaVA-1.5 7B"]).save_pretrained(tmp_path)
    found = metrics_by_title(f"memory --model {tmp_path} --gpus 1 8 --json")

    def gb(row):
        return round(found[f"{tmp_path}: {row}"]["GPU"] / 1e9)
    text = re.sub(r"\s+", " ", PAGES["README.md"])
    sft, ppo = gb("SFT, LoRA 16, 1 GPUs"), gb("PPO, LoRA 16, 1 GPUs")
    assert f"a 7B in bf16 takes {sft} GB for SFT and DPO and {ppo} for PPO" in text
    sft, ppo = gb("SFT, full, 8 GPUs"), gb("PPO, full, 8 GPUs")
    assert f"full training on eight GPUs {sft} and {ppo} GB each" in text
    row = re.search(r"LLaVA-1.5 7B.*?\nSFT (.*?)\n", PAGES["benchmarks/README.md"], re.DOTALL)[1].split()
    assert [cell.rstrip("*") for cell in row][:2] == [str(gb(f"SFT, full, {n} GPUs")) for n in (1, 8)]


def test_the_front_page_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 140


def test_an_export_answers_in_transformers(place, tmp_path, capsys):
    """The README's Python, on a tiny model and image."""
    done = tiny.fork("sft", "--model", place / "model", "--data", place / "rows.json", "--images",
                     place / "images", "--max_steps", 1, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    code, = re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.DOTALL)
    code = code.replace("runs/dpo-7b", f"{tmp_path}/out").replace("cat.jpg", f"{place}/images/p0.png")
    names = {}
    exec(code, names)  # noqa: S102
    assert names["turn"]["content"][0]["path"].startswith(str(place)) and capsys.readouterr().out.strip()
