"""A folder that `docker build` turns into an image which serves one artifact."""

from dlops.deploy.docker.context import write_docker_context

__all__ = ["write_docker_context"]
