"""Secure aggregation: a coordinator learns the sum of the devices' results, and no single one (``docs/secure.md``).

After Bonawitz et al. 2017 (ACM CCS, "Practical Secure Aggregation for Privacy-Preserving Machine Learning"). Needs the
``cryptography`` package (extra ``secure``).
"""
