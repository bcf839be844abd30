"""The stored measurements: complete, and saying what the notebook and the README say of them."""

import numpy as np
import pandas as pd
import pytest

import shared
from budgets import ROOT

NETWORKS = ["DCN", "DLRM", "plain MLP"]


def measured(name):
    return pd.read_csv(ROOT / f"figures/measured/{name}.csv")


def scores_of(data):
    scores = measured("comparison_scores")
    return scores[scores["data"] == data]


def by_seed(data, optimizer):
    """Log loss of each model (rows) and seed (columns)."""
    scores = scores_of(data)
    runs = scores[scores["optimizer"] == optimizer]
    return runs.pivot(index="model", columns="seed", values="log_loss")


# ---- Complete --------------------------------------------------------------------------------


def test_every_rate_was_tried():
    rates = measured("learning_rates")
    assert len(rates) == 3 * 5 * 2 * 4
    tried = rates.groupby(["data", "layers", "model", "optimizer"])["learning_rate"]
    assert (tried.nunique() == 4).all()


def test_every_pair_of_model_and_optimizer_ran_three_times():
    scores = measured("comparison_scores")
    assert len(scores) == 2 * 5 * 2 * 3
    assert (scores.groupby(["data", "model", "optimizer"])["seed"].nunique() == 3).all()
    assert len(measured("comparison_curves")) == 8 * len(scores)
    assert len(measured("comparison_groups")) == 10 * len(scores)


def test_the_closed_loops_are_ten_worlds_of_the_same_ways(notebook):
    kept = measured("closed_loop")
    assert kept.groupby("way")["world"].apply(sorted).tolist() == [list(range(10))] * 14
    for world, part in kept.groupby("world"):
        extremity = notebook.small_world(world).extremity.mean()
        assert np.allclose(part["catalogue"], extremity, atol=1e-3)


# ---- The comparison's verdict ----------------------------------------------------------------


def test_with_adagrad_three_networks_lie_level_in_the_mean():
    losses = by_seed("toy", "Adagrad").loc[NETWORKS]
    assert np.ptp(losses.mean(axis=1)) < 0.001
    others = losses.drop("DLRM")
    better = losses.loc["DLRM"] < others.min(axis=None)
    assert sorted(better) == [False, True, True]  # two of DLRM's runs beat all, one loses to all
    assert losses.loc["DLRM"].max() > others.max(axis=None)


def test_with_sgd_dlrm_is_first_and_best_of_all_ten():
    table, spread = (shared.table_of(scores_of("toy"), s)["log_loss"] for s in ("mean", "std"))
    assert table.idxmin() == ("SGD", "DLRM")
    noise = spread["SGD", "DLRM"]
    assert table["SGD"].drop("DLRM").min() - table["SGD", "DLRM"] > 5 * noise
    assert table.nsmallest(2).diff().iloc[1] > 2 * noise


def test_with_sgd_dcn_and_the_factorization_machine_diverge_where_others_learn():
    tried = measured("learning_rates").query("layers == 'paper' and optimizer == 'SGD'")
    at_0_3 = tried[tried["learning_rate"] == 0.3].set_index("model")["log_loss"]
    assert np.isinf(at_0_3[["DCN", "factorization machine"]]).all()
    assert np.isfinite(at_0_3[["DLRM", "plain MLP"]]).all()


def test_with_adagrad_0_02_is_best_for_the_networks_and_dlrm_pays_most_for_more():
    tried = measured("learning_rates").query("layers == 'paper' and optimizer == 'Adagrad'")
    losses = tried.pivot(index="model", columns="learning_rate", values="log_loss").loc[NETWORKS]
    assert (losses.idxmin(axis=1) == 0.02).all()
    dearer = losses[0.08] - losses[0.02]
    assert dearer["DLRM"] > 2 * dearer.drop("DLRM").max()


def test_on_film_ratings_dlrm_leads_with_adagrad_and_the_plain_mlp_with_sgd():
    adagrad, sgd = (by_seed("MovieLens", optimizer) for optimizer in ("Adagrad", "SGD"))
    assert adagrad.mean(axis=1).idxmin() == "DLRM"
    assert sgd.mean(axis=1).idxmin() == "plain MLP"
    better = sgd.loc["DLRM"] < sgd.loc["plain MLP"].min()
    assert sorted(better) == [False, True, True]  # one of DLRM's three runs failed


def test_dlrm_takes_the_most_seconds():
    seconds = shared.table_of(scores_of("toy"))["seconds"]
    assert seconds["Adagrad"].idxmax() == seconds["SGD"].idxmax() == "DLRM"


def test_calibration_errors_are_those_of_the_stored_groups():
    """The table's column, computed again from the other file."""
    keys = ["data", "model", "optimizer", "seed"]
    groups = measured("comparison_groups")
    groups["error"] = (groups["prediction"] - groups["share"]).abs()
    again = groups.groupby(keys)["error"].mean()
    stored = measured("comparison_scores").set_index(keys)["calibration_error"]
    assert np.allclose(again.sort_index(), stored.sort_index(), atol=1e-5)


def test_dlrm_goes_furthest_at_every_number_of_rows():
    for _, scores in measured("data_sizes").groupby("rows"):
        shares = shared.share_of_the_way(scores, scores["truth_log_loss"].iloc[0]).mean()
        assert shares.idxmax() == "DLRM"


def test_every_rival_goes_further_with_more_rows():
    shares = [
        shared.share_of_the_way(scores, scores["truth_log_loss"].iloc[0]).mean()
        for _, scores in measured("data_sizes").groupby("rows")
    ]
    steps = pd.DataFrame(shares).drop(columns="logistic regression").diff().iloc[1:]
    assert len(steps) == 4 and (steps > 0).all(axis=None)


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
