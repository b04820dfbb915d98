"""farm demo: the main job on real photographs, with the right answer known beforehand."""


def demo() -> None:
    """Run the main job on a small dataset whose accuracy is known beforehand."""
