"""The command line: what it prints, what it returns, and what it never imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prefopt.cli import guarded, main, recipe_main
from prefopt.errors import ConfigError, TrainingError
from prefopt.recipe.registry import SIGNALS, get_objective, get_signal, objective_names
from prefopt.recipe.schema import Recipe
from prefopt.recipe.scripts import RECIPE_SCRIPTS
from prefopt.recipe.walk import sections

ROOT = Path(__file__).resolve().parents[2]

RECIPE = """\
model: {path: org/model}
data: {train: [{path: org/pairs, split: train}]}
objective: {name: simpo, beta: 2.5}
train: {learning_rate: 1e-6}
run: {output_dir: OUT}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "run")))
    return str(path)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Recipes that reach the trainer, which is not run."""
    recipes: list[Recipe] = []
    monkeypatch.setattr("prefopt.wiring.train", recipes.append)
    return recipes


# --- check ---------------------------------------------------------------------------------------


def test_check_prints_fine_and_notes(recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", recipe_file]) == 0
    assert capsys.readouterr().out == (
        f"{recipe_file}: fine\n  note: not checked, on the hub: org/model, org/pairs\n"
    )


def test_check_returns_2_with_every_problem_and_no_traceback(
    recipe_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", recipe_file, "train.seed=x", "model.pth=1"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"{recipe_file}: 2 problems\n")
    assert "Traceback" not in output.err


def test_overrides_may_stand_before_and_after_options(
    recipe_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["check", recipe_file, "train.seed=3", "--num-processes", "2"]
    assert main([*arguments, "train.global_batch_size=7"]) == 2
    assert "does not divide over 2 processes" in capsys.readouterr().err
    assert main([*arguments, "train.global_batch_size=8", "--assume-cuda"]) == 0


@pytest.mark.parametrize(
    "arguments", [["check", "RECIPE", "--nope"], ["keys", "train", "a=b"], ["check"], ["nope"], []]
)
def test_unknown_arguments_are_refused(
    recipe_file: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([recipe_file if a == "RECIPE" else a for a in arguments])
    assert caught.value.code == 2
    assert "usage: prefopt" in capsys.readouterr().err


# --- exit codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("bad"), 2), (TrainingError("nan"), 1), (KeyboardInterrupt(), 130)],
)
def test_known_errors_become_exit_codes(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert guarded(fail) == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)


def test_a_bad_recipe_is_reported_by_one_process_of_a_machine_and_a_failure_by_its_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "9")
    guarded(lambda: fail(ConfigError("bad")))
    assert capsys.readouterr().err == ""
    guarded(lambda: fail(TrainingError("loss is nan")))
    assert capsys.readouterr().err == "[rank 9] loss is nan\n"


# --- train and recipes/*.py ----------------------------------------------------------------------


def test_train_checks_then_trains(recipe_file: str, trained: list[Recipe]) -> None:
    assert main(["train", recipe_file, "train.seed=9"]) == 0
    assert [recipe.train.seed for recipe in trained] == [9]
    assert main(["train", recipe_file, "reference={name: initial}"]) == 2
    assert len(trained) == 1


def test_a_launch_checks_the_batch_against_its_processes(
    recipe_file: str,
    trained: list[Recipe],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launch = {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    assert recipe_main("simpo", [recipe_file]) == 2
    assert "does not divide over 3 processes" in capsys.readouterr().err
    assert not trained


@pytest.mark.parametrize(
    ("script", "overrides", "right"),
    [
        ("dpo", [], "simpo"),
        ("simpo", ["objective={name: dpo}"], "dpo"),
        ("simpo", ["objective={name: orpo}"], "preference"),
        ("preference", [], "simpo"),
        ("simpo", ["objective=null", "stage=sft"], "sft"),
        ("sft", [], "simpo"),
        ("sft", ["objective=null", "stage=reward_model"], "reward_model"),
    ],
)
def test_a_script_refuses_another_scripts_recipe_and_names_it(
    recipe_file: str,
    trained: list[Recipe],
    capsys: pytest.CaptureFixture[str],
    script: str,
    overrides: list[str],
    right: str,
) -> None:
    assert recipe_main(script, [recipe_file, *overrides]) == 2
    assert f"Launch recipes/{right}.py" in capsys.readouterr().err
    assert not trained
    assert recipe_main(right, [recipe_file, *overrides]) == 0
    assert len(trained) == 1


@pytest.mark.parametrize("objective", ["dpo", "simpo", "ipo"])
def test_rollouts_are_launched_by_online_dpo_whatever_the_objective(
    recipe_file: str, trained: list[Recipe], capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    own = objective if objective in RECIPE_SCRIPTS else "preference"
    offline = [recipe_file, f"objective={{name: {objective}}}"]
    online = [*offline, "regime={name: rollouts}", "signals=[{name: length_penalty}]"]
    for script, arguments, said in [
        (own, online, "regime.name = 'rollouts', and this script trains on a fixed data set"),
        ("online_dpo", offline, "regime.name = 'offline', and this script trains on rollouts"),
    ]:
        right = own if script == "online_dpo" else "online_dpo"
        assert recipe_main(script, arguments) == 2
        assert f"{said}. Launch recipes/{right}.py" in capsys.readouterr().err
        assert recipe_main(right, arguments) == 0
    assert len(trained) == 2


def test_every_recipe_script_exists_and_is_its_own_name() -> None:
    scripts = {path.stem: path.read_text() for path in (ROOT / "recipes").glob("*.py")}
    for name in {*RECIPE_SCRIPTS.values(), "preference", "online_dpo"}:
        assert f'recipe_main("{name}")' in scripts[name]


# --- pages ---------------------------------------------------------------------------------------


def test_keys_lists_every_key_of_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys"]) == 0
    listed = set(re.findall(r"^  (\S+)  ", capsys.readouterr().out, flags=re.MULTILINE))
    known = {f"{name}.{key}".lstrip(".") for name, s in sections(Recipe) for key in s.model_fields}
    assert known == listed


def test_keys_of_a_section_show_type_bound_default_and_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["keys", "train"]) == 0
    output = capsys.readouterr().out
    assert "train.warmup_frac  number >= 0 <= 1, default 0.1\n      Share of all steps" in output
    assert "train.max_grad_norm  number > 0 | null, default 1.0" in output
    assert "train.optimizer  adamw | rmsprop, default adamw" in output
    assert "train.learning_rate  number > 0, required" in output
    assert "model.path" not in output


def test_keys_of_a_list_item_take_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "data.train.0"]) == 0
    assert "data.train.N.weight  number > 0, default 1.0" in capsys.readouterr().out


def test_keys_of_no_section_suggest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_objectives_lists_names_hyper_parameters_needs_and_sources(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["objectives"]) == 0
    output = capsys.readouterr().out
    for name in objective_names():
        spec = get_objective(name)
        assert f"\n{name}  " in f"\n{output}"
        assert spec.source in output
        assert all(f"{key}" in output for key in spec.fields)
    assert "needs pairs, reference; arXiv:2305.18290" in output


def test_one_objective_shows_its_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives", "simpo"]) == 0
    assert "target margin" in capsys.readouterr().out
    assert main(["objectives", "simop"]) == 2
    assert "did you mean 'simpo'?" in capsys.readouterr().err


def test_an_objective_says_what_a_weight_switches_on_and_its_credit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["objectives", "grpo"]) == 0
    output = capsys.readouterr().out
    assert "needs advantages, behavior, samples, reference if beta > 0" in output
    assert "credit group_mean_std on rollouts" in output


def test_credits_list_keys_and_what_they_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["credits"]) == 0
    output = capsys.readouterr().out
    assert "best_worst  min_margin=0.0, reject_longest=false\n    gives pairs; arXiv:" in output
    assert "sopo  \n    gives pairs; takes the data set's own response; arXiv:" in output
    assert "none  \n    gives no labels; " in output
    assert main(["credits", "group_mean_std"]) == 0
    assert "(r_i - mean(r)) / (std(r) + ε)" in capsys.readouterr().out
    assert main(["credits", "best_wrost"]) == 2
    assert "did you mean 'best_worst'?" in capsys.readouterr().err


def test_signals_list_keys_and_the_columns_they_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["signals"]) == 0
    output = capsys.readouterr().out
    for name in SIGNALS:
        spec = get_signal(name)
        assert f"\n{name}  " in f"\n{output}"
        assert spec.source in output
        assert all(key in output for key in (*spec.fields, *spec.needs_fields))
    assert main(["signals", "jugde"]) == 2
    assert "did you mean 'judge'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["check", "show", "train", "merge", "keys", "objectives", "credits", "signals"],
)
def test_help_of_every_command_has_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"example:\n  prefopt {command}" in capsys.readouterr().out


# --- as a program --------------------------------------------------------------------------------


def test_help_imports_no_torch() -> None:
    script = (
        "import sys\nfrom prefopt.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert main(['keys', 'train']) == 0\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'vllm') if name in sys.modules])\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert output.endswith("[]\n")


def test_a_closed_pipe_ends_quietly() -> None:
    run = subprocess.run(
        f"{sys.executable} -m prefopt.cli keys | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith("A whole run.")
    assert run.stderr == ""


BAD = ConfigError("a key that is not there")


def bad_recipe() -> None:
    raise BAD


@pytest.mark.parametrize(
    ("then", "code"), [(lambda: None, 0), (bad_recipe, 2), (lambda: sys.exit(3), 3)]
)
@pytest.mark.parametrize("printed", ["a few words", "more than a buffer holds " * 1000])
def test_a_pipe_that_nobody_reads_changes_no_code_and_says_nothing(
    printed: str,
    then: Callable[[], object],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What did not fit the buffer ends the command where it stands; what did is found at its end."""
    read, write = os.pipe()
    os.close(read)

    def command() -> None:
        nobody.write(printed)
        then()

    with open(write, "w", encoding="utf-8") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        try:
            ended = guarded(command)
        except SystemExit as stop:
            ended = stop.code
    # Closing wrote the rest to nowhere: a buffer that still had a pipe below it would have raised.
    assert ended == (code if len(printed) < 100 else 0)
    assert capfd.readouterr().err == (f"{BAD}\n" if ended == 2 else "")


def test_another_pipe_that_breaks_is_no_success(capfd: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError):
        guarded(lambda: os.write(write, b"to a server that has died"))
    os.close(write)
