"""SFTTrainer beside `SFT`.

| TRL | prefopt |
|---|---|
| `loss_type="nll"` | `SFT()` |
| `loss_type="dft"` | `SFT(weighting="probability")` |
"""

from __future__ import annotations

from pathlib import Path

from peer import Ours, assert_equal, assert_parity, examples, on_completions, step

from prefopt.objectives import SFT

ROWS = examples([(1.0,)] * 5)


def test_cross_entropy(tmp_path: Path) -> None:
    assert_parity(on_completions(ROWS, tmp_path, loss_type="nll"), SFT())


def test_every_token_weighted_by_its_own_probability(tmp_path: Path) -> None:
    assert_parity(on_completions(ROWS, tmp_path, loss_type="dft"), SFT(weighting="probability"))


def test_a_step_in_several_forward_passes_is_the_mean_over_all_its_tokens_in_both(tmp_path: Path) -> None:
    """TRL divides SFT by the tokens of the whole step, as prefopt divides every objective by a count of the step."""
    peer = on_completions(ROWS, tmp_path, loss_type="nll", per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert_equal(Ours().said(SFT(), ROWS, tokens=16), step(peer))
