"""Words and YAML to one checked, frozen run spec; every fault at once. No torch."""
