"""Everything that is looked for on a machine, and what is found. Pure."""

from __future__ import annotations

from launch.checks import gpus, host, links
from launch.findings import Finding, MachineFacts, Severity


def findings(facts: MachineFacts) -> list[Finding]:
    """All of them, errors first."""
    order = list(Severity)
    checks = (*host.CHECKS, *gpus.CHECKS, *links.CHECKS)
    return sorted(
        (found for check in checks for found in check(facts)), key=lambda f: order.index(f.severity)
    )
