"""The stored measurements: complete, and saying what the notebook and the README say of them."""

import numpy as np
import pandas as pd
import pytest

import comparison
import learning_rates
import shared
from budgets import ROOT

RIVALS = ["DCN", "plain MLP"]


def measured(name):
    return pd.read_csv(ROOT / f"figures/measured/{name}.csv")


def by_seed(optimizer, table="comparison_scores"):
    """Log loss on the toy clicks of each model (rows) and seed (columns)."""
    scores = measured(table).query("optimizer == @optimizer")
    return scores.pivot(index="model", columns="seed", values="log_loss")


# ---- Complete --------------------------------------------------------------------------------


RACES = {"small": "comparison_scores", "paper": "comparison_million"}  # layers: the stored table


@pytest.mark.parametrize("layers", RACES)
def test_no_kept_rate_lies_at_an_edge_of_those_tried(layers):
    tried, kept = measured("learning_rates"), shared.best_rates(layers)
    tried = tried[tried["layers"] == layers]
    for pair, rates in tried.groupby(["model", "optimizer"])["learning_rate"]:
        assert rates.min() < kept[pair] < rates.max(), pair


def test_the_stored_rates_are_those_that_the_program_tries():
    stored = measured("learning_rates").drop(columns="log_loss").itertuples(index=False, name=None)
    assert set(stored) == set(learning_rates.searches())


@pytest.mark.parametrize("layers, table", RACES.items())
def test_a_race_ran_with_the_kept_rates(layers, table):
    runs = measured(table).groupby(["model", "optimizer"])["learning_rate"]
    assert (runs.nunique() == 1).all()
    pd.testing.assert_series_equal(runs.first(), shared.best_rates(layers))


@pytest.mark.parametrize("layers, table", RACES.items())
def test_every_model_ran_with_the_same_seeds(layers, table):
    seeds = measured(table).groupby(["model", "optimizer"])["seed"].apply(sorted)
    assert len(seeds) == (len(shared.MODELS) + 1) * 2
    for name, optimizer in seeds.index:
        assert seeds[name, optimizer] == list(comparison.seeds_of(layers, name)), name
    assert len(comparison.seeds_of(layers, "DLRM")) == 10


def test_the_curves_are_those_of_the_runs_that_did_not_run_away():
    scores = measured("comparison_scores")
    assert len(measured("comparison_curves")) == 8 * scores["log_loss"].count()
    away = scores[scores["log_loss"].isna()]
    assert set(away["model"] + away["optimizer"]) == {"DCNSGD"} and len(away) == 2


def test_the_closed_loops_are_ten_worlds_of_the_same_ways(notebook):
    kept = measured("closed_loop")
    assert kept.groupby("way")["world"].apply(sorted).tolist() == [list(range(10))] * 14
    for world, part in kept.groupby("world"):
        extremity = notebook.small_world(world).extremity.mean()
        assert np.allclose(part["catalogue"], extremity, atol=1e-3)


# ---- The comparison's verdict ----------------------------------------------------------------


def test_with_sgd_every_run_of_dlrm_beats_every_rivals():
    losses = by_seed("SGD")
    assert losses.loc["DLRM"].max() < losses.loc[[*RIVALS, "factorization machine"]].min(axis=None)


def test_with_adagrad_every_run_of_dlrm_beats_every_rivals():
    losses = by_seed("Adagrad")
    assert losses.loc["DLRM"].max() < losses.loc[[*RIVALS, "factorization machine"]].min(axis=None)


def lowest_to_highest(model, optimizer):
    losses = by_seed(optimizer, "comparison_million").loc[model]
    return f"{losses.min():.4f} to {losses.max():.4f}"


def test_at_a_million_clicks_adagrad_leaves_no_lead_and_sgd_does():
    adagrad, sgd = (by_seed(each, "comparison_million") for each in ("Adagrad", "SGD"))
    for rival in RIVALS:  # "nobody is ahead": by less than two standard errors
        ahead = adagrad.loc[rival] - adagrad.loc["DLRM"]
        assert abs(ahead.mean()) < 2 * ahead.std() / len(ahead) ** 0.5
    assert (sgd.loc["DLRM"] < sgd.loc[RIVALS].min(axis=None)).sum() == 9  # "nine in ten"
    assert sgd.loc["DCN"].isna().sum() == 2  # "two ran away"


def test_the_tables_of_the_million_are_the_stored_ones():
    notebook = (ROOT / "DLRM.ipynb").read_text(encoding="utf-8")
    for optimizer in ("Adagrad", "SGD"):
        cells = [lowest_to_highest(model, optimizer) for model in ("DLRM", "DCN", "plain MLP")]
        assert f"| {optimizer} | {' | '.join(cells)} |" in notebook
    assert f"by it got {lowest_to_highest(shared.PUBLISHED, 'SGD')}, ahead" in notebook
    readme = (ROOT / "tests/benchmarks/README.md").read_text(encoding="utf-8")
    for model in [*shared.MODELS, shared.PUBLISHED]:
        cells = [lowest_to_highest(model, optimizer) for optimizer in ("Adagrad", "SGD")]
        assert f"| {model} | {' | '.join(cells)} |" in readme


def test_only_networks_come_near_the_best_possible():
    scores = measured("comparison_scores")
    above = (scores["log_loss"] - scores["truth_log_loss"]).groupby(scores["model"])
    assert above.min().min() > 0  # nobody beats the truth
    assert above.min()["logistic regression"] > 5 * above.min()["DLRM"]


def test_no_output_dies_in_the_linear_form_and_some_do_in_every_published_run():
    runs = measured("toy_quality").query("signal")
    dead = runs.pivot(index="seed", columns="model", values="dead_outputs")
    assert (dead["DLRM"] == 0).all() and (dead[shared.PUBLISHED] > 0).all() and len(dead) == 10
    race = measured("comparison_scores")
    assert (race.loc[race["model"] == "DLRM", "dead_outputs"] == 0).all()


def test_the_linear_form_is_better_than_the_published_one():
    runs = measured("toy_quality").query("signal")
    losses = runs.pivot(index="seed", columns="model", values="log_loss")
    difference = losses[shared.PUBLISHED] - losses["DLRM"]
    assert difference.mean() > 2 * difference.std() / len(difference) ** 0.5


def test_dlrm_lies_nearest_to_the_best_possible_from_18000_rows_on():
    losses = measured("data_sizes").pivot_table("log_loss", "rows", "model")
    assert (losses.loc[18_000:].idxmin(axis=1) == "DLRM").all()


def test_every_network_learns_from_more_rows():
    losses = measured("data_sizes").pivot_table("log_loss", "rows", "model")
    assert (losses[["DLRM", *RIVALS]].diff().iloc[1:] < 0).all(axis=None)


def test_what_the_readme_of_the_benchmarks_says_of_toy_clicks():
    table = (ROOT / "tests/benchmarks/README.md").read_text(encoding="utf-8")
    runs = measured("toy_quality").query("signal")
    for name, scores in runs.groupby("model"):
        ends = [f"{scores[c].min():.3f} to {scores[c].max():.3f}" for c in ("auc", "log_loss")]
        assert f"| {name} | {ends[0]} | {ends[1]} |" in table.replace("*", "")


# ---- Speed and size --------------------------------------------------------------------------


def test_what_appendix_c_says_of_the_speeds():
    speeds = measured("training_speed").pivot(index="way", columns="batch", values="rows a second")
    tables, stacked = speeds.loc["26 tables, SGD"], speeds.loc["stacked, 32 bits, SGD"]
    script, fast = speeds.loc["Facebook's script, SGD"], speeds.loc["stacked, bfloat16, SGD"]
    assert round(fast[2048] / tables[2048], 1) == 1.8  # "1.8 times as many"
    assert 1.0 < stacked[2048] / tables[2048] < 1.1  # "stacking alone brings little"
    assert round(stacked[128] / tables[128], 2) == 1.25  # "a quarter"
    assert (script < tables).all() and (script > 0.9 * tables).all()  # "a little slower"


def test_the_stacked_model_reaches_the_same_log_loss_in_a_third_of_the_time():
    (_, slow), (_, quick) = measured("time_to_quality").groupby("way")
    reached = quick[quick["log_loss"] <= slow["log_loss"].iloc[-1]]["seconds"].min()
    assert reached < slow["seconds"].iloc[-1] / 3


def test_the_full_size_run_stays_below_6_gb_and_near_the_best_possible():
    run = measured("full_size_run")
    last = run.iloc[-1]
    assert last["peak_gb"] < 6
    assert 0 < last["log_loss"] - last["truth_log_loss"] < 0.02
    assert run["log_loss"].iloc[0] < last["entropy"] and run["step"].is_monotonic_increasing


# ---- The closed loop, world by world ---------------------------------------------------------


def test_the_folded_table_of_ten_worlds_is_the_stored_one():
    """Means, and in parentheses in how many worlds a way lies on that side of DLRM."""
    worlds = measured("closed_loop").pivot(index="world", columns="way")
    text = (ROOT / "DLRM.ipynb").read_text(encoding="utf-8")
    for way in measured("closed_loop")["way"].unique():
        cells = []
        for measure in ("clicks", "kinds", "channels", "extremity"):
            change = worlds[measure][way] - worlds[measure]["DLRM"]
            agreeing = (np.sign(change) == np.sign(change.mean())).sum()
            count = "" if way == "DLRM" else f" ({agreeing})"
            cells.append(f"{worlds[measure][way].mean():.2f}{count}")
        assert f"| {way} | {' | '.join(cells)} |" in text


def conclusions():
    """For each conclusion of the notebook, in which worlds it holds."""
    worlds = measured("closed_loop").pivot(index="world", columns="way")
    clicks, kinds, extremity = worlds["clicks"], worlds["kinds"], worlds["extremity"]
    channels, catalogue = worlds["channels"], worlds["catalogue"]["DLRM"]
    order = ["chance", "popularity", "DLRM", "truth"]
    mixed, explored = "re-rank 0.5", "explore 0.2"
    narrowing = kinds["chance"] - kinds["DLRM"]
    return {
        "clicks rise in this order": clicks[order].diff(axis=1).iloc[:, 1:].gt(0).all(axis=1),
        "fewer kinds under DLRM than by chance": kinds["DLRM"] < kinds["chance"],
        "the goal explains most of it": kinds["chance"] - kinds["truth"] > 0.8 * narrowing,
        "DLRM is narrower than the goal asks": kinds["DLRM"] < kinds["truth"],
        "DLRM shows extreme channels": extremity["DLRM"] > catalogue + 0.1,
        "without pull it does not": (extremity["no pull"] - catalogue).abs() < 0.1,
        "exploration lowers extremity": extremity["explore 0.4"] < extremity["DLRM"],
        "re-ranking raises it": extremity["re-rank 2"] > extremity["DLRM"],
        "exploration widens the site": channels["explore 0.4"] > channels["DLRM"],
        "re-ranking narrows it": channels["re-rank 2"] < channels["DLRM"],
        "re-ranking brings more kinds": kinds[mixed] > kinds[explored],
        "and more clicks": clicks[mixed] > clicks[explored],
    }


@pytest.mark.parametrize("conclusion", conclusions())
def test_a_conclusion_holds_in_eight_of_ten_worlds(conclusion):
    holds = conclusions()[conclusion]
    assert len(holds) == 10 and holds.sum() >= 8
