"""Everything that is measured: this library, and what a user would pick instead, each tuned as its own docs advise."""

from benchmarks.providers import faiss_flat, flash_kmeans, kd_trees, keops, ours, plain_torch, scikit, vector_quantize
from benchmarks.providers.provider import Provider

OURS = ours.BRUTE

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        *ours.PROVIDERS,
        *plain_torch.PROVIDERS,
        faiss_flat.PROVIDER,
        *kd_trees.PROVIDERS,
        scikit.PROVIDER,
        keops.PROVIDER,
        flash_kmeans.PROVIDER,
        vector_quantize.PROVIDER,
    )
}


def serving(device: str, names: list[str] | None = None) -> list[Provider]:
    """The providers for a device type, `OURS` first, by name or all; whether they are installed is another question.

    Raises:
        ValueError: for a name that is none of theirs.
    """
    unknown = sorted(set(names or ()) - set(PROVIDERS))
    if unknown:
        raise ValueError(f"providers: {unknown} not in {sorted(PROVIDERS)}")
    wanted = [OURS.name, *(names or PROVIDERS)]
    return [provider for name, provider in PROVIDERS.items() if name in wanted and device in provider.runs_on]


__all__ = ["OURS", "PROVIDERS", "Provider", "serving"]
