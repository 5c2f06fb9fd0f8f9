"""pyllm report: what it reads, what it says, and, in headless Chromium, what is seen."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from pyllm import cli
from pyllm.benchmarks import page, report
from pyllm.benchmarks.catalogue import BENCHMARKS
from pyllm.benchmarks.measure import Case, Result

MACHINE = {"pyllm": "0.1.0", "torch": "2.13.0", "device": "cpu", "cpu": "A <fast> processor", "threads": 2}
PEERS = ("eager", "pyllm", "compile", "hf")


def result(op: str, direction: str, pyllm: float = 1.0, variant: str = "", **options) -> Result:
    benchmark = BENCHMARKS[op]
    case = Case(benchmark, options.pop("shape", benchmark.shapes[0]), "bf16", direction, variant)
    seconds = dict(zip(PEERS, (2e-3, pyllm * 1e-3, 1.5e-3, 3e-3), strict=True))
    sizes = dict(zip(PEERS, (4 * 2**20, 2**20, 2**21, 2**22), strict=True))
    measured = {"seconds": seconds, "ratio": {n: 2e-3 / s for n, s in seconds.items()}, "spread": 0.125}
    if direction == "both":
        measured["saved"] = sizes
    return Result(case, "native", **{**measured, "memory": sizes, "rate": 5e10, "share": 0.4, **options})


RESULTS = [
    result("bert_layer", "both", variant="full"),
    result("bert_layer", "both", 3.0, variant="half padded"),
    result("bert_layer", "forward", variant="full"),
    result("softmax", "forward", 0.2, variant="causal", fresh_pages=True),
    Result(
        Case(BENCHMARKS["softmax"], (1, 8, 8), "fp32", "forward"), "native", problem="output 0: 3 times <too> wrong"
    ),
    result("softmax", "recorded", shape=BENCHMARKS["softmax"].tiny, end_to_end=True),
]


@pytest.fixture
def folder(tmp_path):
    """Results of a machine, in JSON with their CSV; of a GPU, as `make gpu` writes them; and a CSV without JSON."""
    report.write_json(tmp_path / "cpu" / "all.json", RESULTS, MACHINE | {"copy": "30.0 GB/s"})
    report.write_csv(tmp_path / "cpu" / "all.csv", RESULTS)
    report.write_json(tmp_path / "more.json", [result("rms_norm", "backward")], MACHINE | {"copy": "31.0 GB/s"})
    report.write_csv(tmp_path / "old.csv", [result("layer_norm", "forward"), result("layer_norm", "backward")])
    rows = [r.row() for r in (result("gpt2_block", "both", variant="full", end_to_end=True),)]
    parts = {"layers": {"state": "ok", "rows": rows}, "build": {"state": "ok", "rows": []}}
    facts = {**MACHINE, "device": "cuda", "gpu": "A GPU"}
    (tmp_path / "gpu.json").write_text(json.dumps({"machine": facts, "parts": parts}))
    (tmp_path / "bench.json").write_text(json.dumps({"machine_info": {}, "benchmarks": []}))  # pytest-benchmark's
    (tmp_path / "curves.csv").write_text("step,loss\n1,2.0\n")
    return tmp_path


def test_what_is_read(folder):
    machines = {str(machine): machine for machine in page.read(folder)}
    names = ["A <fast> processor, 2 threads, PyTorch 2.13.0", "A GPU, PyTorch 2.13.0", "Machine not recorded"]
    assert list(machines) == names
    assert [len(machine.rows) for machine in machines.values()] == [len(RESULTS) + 1, 1, 2]
    assert machines[names[0]].limits == {"copy": ["30.0 GB/s", "31.0 GB/s"]}
    from_csv = machines[names[2]].rows[0]
    assert from_csv["ratio_pyllm"] == 2.0 and from_csv["fresh_pages"] is False and "problem" not in from_csv
    assert report.against(from_csv, "compile") == pytest.approx(1.5)


def test_the_page_has_every_number_and_loads_nothing(folder):
    html = page.html(page.read(folder))
    assert html.count('<th scope="row">') == len(RESULTS) + 1 + 1 + 2
    for text in (
        "bert_layer 8x256x768 bf16 half padded",
        "fresh pages",
        "0.67 x",
        "± 12 %",
        "1.0 MiB, 0.25 x",
        "2.00 ms",
    ):
        assert text in html, text
    assert "RED: output 0: 3 times &lt;too&gt; wrong" in html and "<too>" not in html and "<fast>" not in html
    assert "30.0 GB/s / 31.0 GB/s" in html and "30 GB/s" not in html
    assert not re.search(r"<(script|iframe|img|object|embed)|@import|@font-face|javascript:", html)
    links = re.findall(r'(?:src|href)="([^"]*)"', html) + re.findall(r"url\(([^)]*)\)", html)
    assert links and all(link.startswith(("#", "data:")) for link in links)
    identities = re.findall(r' id="([^"]*)"', html)
    assert len(identities) == len(set(identities)) and {link[1:] for link in links if link[0] == "#"} <= {*identities}


def test_charts_are_of_what_is_comparable(folder):
    machine = page.read(folder)[0]
    groups = page._groups(machine.rows)
    assert {name: len(rows) for name, rows in groups.items()} == {"bert_layer": 3, "softmax": 1, "rms_norm": 1}
    (label, bars), *_ = page._speed(groups["bert_layer"])
    assert label == "8x256x768 bf16 full both"
    assert [(bar.text, bar.spread) for bar in bars] == [
        ("2.00 × eager", 0.125),
        ("1.50 × compile", 0.125),
        ("3.00 × hf", 0.125),
    ]
    (_, bars), *_ = saved = page._memory("saved_bytes", groups["bert_layer"])
    assert len(saved) == 2 and [bar.value for bar in bars] == [0.25, 0.5, 1.0]
    assert page._tokens(groups["bert_layer"])[0][1][0].text == "2,048,000 pyllm"
    assert page._size(3 * 2**30) == "3.0 GiB" and page._size(100) == "0.1 KiB"


def test_markdown_has_a_column_for_each_pass(folder):
    text = page.markdown(page.read(folder))
    assert "| case | both | forward | backward |" in text
    assert "| bert_layer 8x256x768 bf16 full | 2.00 × ± 12 % | 2.00 × ± 12 % |  |" in text
    assert "| gpt2_block 4x256x1024 bf16 full, end to end | 2.00 × ± 12 % |" in text


def test_the_command_writes_what_it_is_asked_for(folder, capsys):
    assert cli.main(["report", str(folder)]) == 0
    assert "report.html" in capsys.readouterr().out and (folder / "report.html").read_text().startswith("<!DOCTYPE")
    files = folder / "new" / "page.html", folder / "new" / "table.md"
    assert cli.main(["report", str(folder), "--html", str(files[0]), "--markdown", str(files[1])]) == 0
    assert all(file.exists() for file in files)


def test_what_cannot_be_reported_is_said(tmp_path, capsys, monkeypatch):
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "there are no results of pyllm bench in" in capsys.readouterr().out
    (tmp_path / "half.json").write_text('{"machine": ')
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "half.json: Expecting value" in capsys.readouterr().out
    report.write_json(tmp_path / "half.json", RESULTS, MACHINE)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "the plots need matplotlib" in capsys.readouterr().out


# --- in a browser ---

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
const seen = {
  charts: [...document.querySelectorAll("figure svg")].map(s => [s.clientWidth, s.clientHeight]),
  bars: [...document.querySelectorAll("figure svg path")].filter(p => p.getBBox().width > 0).length,
  ink: getComputedStyle(document.querySelector("figure svg text")).fill,
  width: document.documentElement.scrollWidth, screen: innerWidth,
  rows: document.querySelectorAll("tbody tr").length, red: document.querySelectorAll("tr.red").length,
  loaded: performance.getEntriesByType("resource").map(e => e.name),
};
document.body.replaceChildren(JSON.stringify(seen));
</script>"""


@pytest.fixture
def browse(tmp_path):
    if BROWSER is None:
        pytest.skip("no Chromium on the path; apt-get install chromium")

    def run(*options: str) -> str:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        command += ["--disable-component-update", "--no-first-run", "--hide-scrollbars", "--enable-logging=stderr"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert ":CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_seen(folder, browse, scheme):
    from matplotlib.image import imread

    html = page.html(page.read(folder))
    (folder / "page.html").write_text(html)
    (folder / "probe.html").write_text(html.replace("</body>", f"{PROBE}</body>"))
    options = ["--window-size=500,1600", *(["--force-dark-mode"] if scheme == "dark" else [])]
    seen = json.loads(re.search(r"<body>(\{.*\})\s*</body>", browse(*options, "--dump-dom", _url(folder, "probe")))[1])
    assert len(seen["charts"]) == html.count("<svg") >= 15
    assert all(width > 300 and height > 40 for width, height in seen["charts"])
    assert seen["bars"] > 60 and seen["rows"] == len(RESULTS) + 4 and seen["red"] == 1
    assert seen["width"] <= seen["screen"], "the page scrolls sideways"
    assert seen["loaded"] == []
    assert seen["ink"] == {"light": "rgb(0, 0, 0)", "dark": "rgb(255, 255, 255)"}[scheme]

    browse(*options, f"--screenshot={folder / 'page.png'}", _url(folder, "page"))
    pixels = torch.from_numpy(imread(folder / "page.png"))[..., :3]
    assert pixels.shape == (1600, 500, 3)
    blue = (pixels - torch.tensor([0x0E, 0x83, 0xC4]) / 255).abs().amax(-1) < 0.02
    assert blue.sum() > 2000, "no bars of pyllm's colour"
    assert (pixels[0, 0].mean() > 0.9) == (scheme == "light")


def _url(folder, name: str) -> str:
    return (folder / f"{name}.html").as_uri()
