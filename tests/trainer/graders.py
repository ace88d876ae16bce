"""A grader for tests with verl's signature: it pays for something a random model does half of the time."""


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """1 when the number of characters is even."""
    return float(len(solution_str) % 2 == 0)
