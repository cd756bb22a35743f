"""The front door: quick to open, and every verb does what its help says."""

import json
import statistics
import subprocess
import sys
import time

HELP = [sys.executable, "-P", "-m", "headway.launcher", "--help"]


def test_help_is_there_within_half_a_second_and_loads_no_torch():
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run(HELP, capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0 and "headway train" in done.stdout
    assert statistics.median(times) <= 0.5
    code = "import sys; from headway.launcher.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_a_launcher_loads_no_compiler():  # it takes seconds, and makes a folder before its place is known
    code = "import sys, headway.launcher.launch.start; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


def test_an_unknown_verb_or_option_ends_with_64(headway):
    for arguments in (["fly"], [], ["train"], ["train", "tiny.yaml", "--fast"], ["doctor", "a=b"]):
        done = headway.run(*arguments)
        assert done.returncode == 64, arguments
        assert "usage:" in done.stderr and "Traceback" not in done.stderr


def test_a_mistyped_key_names_the_right_one_with_its_line(headway):
    headway.spec.write_text(headway.spec.read_text().replace("top_k: 1", "topk: 1"))
    done = headway.train()
    assert done.returncode == 64
    assert "tiny.yaml:4" in done.stderr and "attention.topk" in done.stderr and "attention.top_k" in done.stderr
    assert "Traceback" not in done.stderr


def test_print_config_shows_where_every_value_comes_from(headway):
    done = headway.train("optimizer.lr=1e-3", "--print-config")
    lines = {line.split(" = ")[0].strip(): line for line in done.stdout.splitlines() if " = " in line}
    assert "argument 'optimizer.lr=1e-3'" in lines["optimizer.lr"]
    assert "tiny.yaml:3" in lines["model.width"]
    assert "default" in lines["optimizer.weight_decay"]


def test_plan_prints_what_the_run_will_cost(headway):
    done = headway.run("plan", str(headway.spec), "--json")
    cost = json.loads(done.stdout)
    assert cost["num_params"] == sum(cost["params_by_part"].values())
    assert cost["training_tokens"] == 10240
    assert cost["training_flops_useful"] == 3 * cost["flops_per_token_useful"] * 10240


def test_bench_step_writes_ratios_with_their_spread(headway):
    out = headway.folder / "step.json"
    done = headway.run(
        "bench", "step", str(headway.spec), "--steps", "4", "--against", "attention.type=gqa", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    for name in ("bare", "against"):
        ratio = result[f"ratio_to_{name}"]
        assert ratio["n"] == 4 and 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        pairs = zip(result["raw_step_s"], result[f"raw_{name}_step_s"], strict=True)
        assert sorted(a / b for a, b in pairs)[0] == ratio["min"]
    assert abs(sum(result["share_of_step"].values()) - 1) < 0.2  # medians of shares need not add up exactly
    assert result["machine"]["cores"] >= 1 and result["versions"]["torch"]


def test_bench_data_measures_the_loader_alone(headway):
    done = headway.run("bench", "data", str(headway.spec), "--steps", "4", "--out", "data.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((headway.folder / "data.json").read_text())["batch_s"]["n"] == 4
