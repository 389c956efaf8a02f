"""The contract every op keeps, generated from ``vitkernels.registry``: a new op is tested here the moment it is registered."""
