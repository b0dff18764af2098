"""How property tests run: as thoroughly on a busy machine as on an idle one, for time decides no test."""

from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
