"""Try the law of fused steps on random examples for a while: `make fuzz`.

Prints the seed of every round before it begins, so that one that ends the process can be tried
again: FUZZ_SEED=... make fuzz
"""

import os
import sys
import time
import traceback
from random import SystemRandom

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.laws.examples import Example, examples
from tests.laws.test_fused import check

ROUND = 100  # examples


def main() -> None:
    """Rounds of examples until the time is over; the exit status is 1 if one has failed."""
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "3600"))
    fixed = os.environ.get("FUZZ_SEED")
    count = failures = rounds = 0

    def counted(example: Example) -> None:
        nonlocal count
        count += 1
        check(example)

    while rounds == 0 or (time.monotonic() < end and fixed is None):
        number = int(fixed) if fixed else SystemRandom().getrandbits(32)
        rounds += 1
        print(f"seed {number}: {count} examples, {failures} failures so far", flush=True)
        law = settings(
            deadline=None,
            database=None,
            max_examples=ROUND,
            phases=(Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        try:
            seed(number)(law(given(example=examples())(counted)))()
        except Exception:
            failures += 1
            traceback.print_exc()
    print(f"{count} examples in {rounds} rounds, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
