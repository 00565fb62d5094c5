from __future__ import annotations

import numpy as np
import pytest

from colqwen3_retrievers.langchain.diversity import most_diverse
from tests.hashing import HashingEncoder


@pytest.mark.parametrize("seed", range(5))
def test_mmr_is_the_rule_of_its_paper(seed: int, encoder: HashingEncoder) -> None:
    generator = np.random.default_rng(seed)
    documents = [encoder.multi_vector(" ".join(map(str, generator.integers(0, 9, 5))), None) for _ in range(12)]
    relevances = generator.uniform(-1, 1, 12).tolist()
    chosen = [int(np.argmax(relevances))]
    while len(chosen) < 8:
        gains = {}
        for n in set(range(12)) - set(chosen):
            said = max(
                float(np.mean([max(float(a @ b) for b in documents[s].vectors) for a in documents[n].vectors]))
                for s in chosen
            )
            gains[n] = 0.3 * relevances[n] - 0.7 * said
        chosen.append(max(gains, key=lambda n: gains[n]))
    assert most_diverse(relevances, documents, 8, 0.3) == chosen
