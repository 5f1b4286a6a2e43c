"""Every search that is measured, by name: a package needs this file, and the registry stands above the providers."""

from benchmarks.providers import peers, plain_torch, revq_searches
from benchmarks.providers.provider import Provider
from benchmarks.providers.revq_searches import BRUTE_FORCE

PROVIDERS: dict[str, Provider] = {
    provider.name: provider for provider in (*revq_searches.PROVIDERS, *plain_torch.PROVIDERS, *peers.PROVIDERS)
}


def serving(device: str, names: list[str] | None = None) -> list[Provider]:
    """The providers for a device type, `BRUTE_FORCE` first, by name or all; some may not be installed.

    Raises:
        ValueError: for a name that no provider has.
    """
    unknown = sorted(set(names or ()) - set(PROVIDERS))
    if unknown:
        raise ValueError(f"providers: expected some of {sorted(PROVIDERS)}, got {unknown}")
    wanted = [BRUTE_FORCE.name, *(names or PROVIDERS)]
    return [provider for name, provider in PROVIDERS.items() if name in wanted and device in provider.runs_on]


__all__ = ["BRUTE_FORCE", "PROVIDERS", "Provider", "serving"]
