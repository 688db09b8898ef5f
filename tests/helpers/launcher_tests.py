"""What the tests share that ask the real launcher too."""

from hypothesis import HealthCheck, settings

REFUSED = None
property_test = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
