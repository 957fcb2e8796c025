"""Training: Lightning modules, data modules and the ``zoo fit|validate|test|predict`` command."""
