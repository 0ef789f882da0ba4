"""What a wrong `python -m export` must end with."""


def assert_one_error(status: int, stderr: str, *words: str) -> None:
    assert status == 2, stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("error: ")
    for word in words:
        assert word in stderr
