"""The hostfile launcher: over ssh, one agent on each host."""

import os
from pathlib import Path

from cogview2.launch.hostfile import read_hostfile
from cogview2.launch.job import Command, Host, JobSpec
from cogview2.launch.preflight import Findings, examine
from cogview2.launch.ssh_command import ssh_argv
from cogview2.pipeline.config.launch import LaunchConfig
from cogview2.pipeline.config.stages import Recipe
from cogview2.pipeline.run_dir import RunDirectory


class SurveyedHosts:
    """Hosts of a hostfile that are reached by ssh: what the launchers that need no scheduler have in common."""

    def __init__(self, name: str, hosts_file: Path | None) -> None:
        self.name = name
        self._hosts = read_hostfile(hosts_file)
        self._findings: Findings | None = None
        self._launch = LaunchConfig()
        """Of the recipe, once `hosts` was asked."""

    def hosts(self, recipe: Recipe) -> tuple[Host, ...]:
        """Return the hosts of the file."""
        self._launch = recipe.launch
        return self._hosts

    def uses_cpu(self, recipe: Recipe) -> bool:
        """Return whether no host has a GPU, or the recipe says so; before the look only the recipe counts."""
        if self._findings is None:
            return recipe.launch.environment.get("DS_ACCELERATOR") == "cpu"
        return self._findings.cpu

    def check(self, run: RunDirectory, recipe: Recipe) -> None:
        """Look at all hosts at once, print warnings; see `preflight.examine`."""
        first_look = self._findings is None
        self._findings = examine(self._hosts, run.path, recipe.launch)
        if first_look:
            for warning in self._findings.warnings:
                print(f"warning: {warning}")

    def rendezvous(self, recipe: Recipe) -> tuple[str, int]:
        """Return the first host and the recipe's port, else one that was free at the look."""
        port = recipe.launch.master_port or (self._findings.port if self._findings is not None else 0)
        return self._hosts[0].name, port


class HostfileLauncher(SurveyedHosts):
    """One ssh connection and one agent for each host of the file."""

    def commands(self, spec: JobSpec) -> list[Command]:
        """Return one ssh command for each host; paths and numbers stand in them, no value of a variable."""
        return [
            Command(
                tuple(ssh_argv(host.name, spec.agent_argv(index), self._launch.ssh)),
                dict(os.environ),
                host.name,
                "stdin",
            )
            for index, host in enumerate(spec.hosts)
        ]
