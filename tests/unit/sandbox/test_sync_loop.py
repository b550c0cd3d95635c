"""Callbacks of the background loop: what waits for a slow one has a bound."""

from rorqual.sandbox.sync_loop import MAX_UNTAKEN, Calls


def test_s3_output_that_a_callback_is_too_slow_for_is_left_out() -> None:
    calls, taken = Calls(), [0]
    pieces = (5 << 20) // 1000

    def take(text: str) -> None:
        taken[0] += len(text)

    hand_over = calls.wrap(take)
    assert hand_over is not None and calls.wrap(None) is None

    async def nothing() -> str:
        return "its result"

    for _ in range(2):
        before = taken[0]
        for _ in range(pieces):  # before anybody takes a piece
            hand_over("x" * 1000)
        assert calls.wait_for(nothing()) == "its result"
        assert MAX_UNTAKEN - 1000 <= taken[0] - before <= MAX_UNTAKEN == 4 << 20
