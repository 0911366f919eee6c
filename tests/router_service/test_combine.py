import numpy as np
import torch

from router_service.combine import Combiner

CPU = torch.device("cpu")


def test_sums_partials_in_float32_and_rounds_once():
    combiner = Combiner(3, 2, CPU)
    combiner.add(np.array([0, 2], dtype=np.int32), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    combiner.add(None, torch.full((3, 2), 2.0**-9))
    combiner.add(np.array([0], dtype=np.int32), torch.full((1, 2), 2.0**-9))
    out = combiner.result(torch.bfloat16)
    # One rounding at the end: 1 + 2 * 2^-9 is a bfloat16 (1 + 2^-8 is a tie to even), 1 + 2^-9 twice would
    # be 1.
    expected = torch.tensor([[1 + 2.0**-8, 2 + 2.0**-8], [2.0**-9] * 2, [3 + 2.0**-9, 4 + 2.0**-9]]).bfloat16()
    assert torch.equal(out, expected)


def test_leaves_the_partials_alone():
    full, again, some = torch.ones(2, 2), torch.ones(2, 2), torch.ones(1, 2)
    combiner = Combiner(2, 2, CPU)
    combiner.add(None, full)
    combiner.add(None, again)
    combiner.add(np.array([1], dtype=np.int32), some)
    assert combiner.result(torch.float32).tolist() == [[2, 2], [3, 3]]
    assert full.eq(1).all()
    combiner = Combiner(2, 2, CPU)
    combiner.add(None, full)
    combiner.add(np.array([1], dtype=np.int32), some)
    assert combiner.result(torch.float32).tolist() == [[1, 1], [2, 2]]
    assert full.eq(1).all()


def test_no_partials_is_zero():
    assert torch.equal(Combiner(2, 3, CPU).result(torch.float16), torch.zeros(2, 3, dtype=torch.float16))
