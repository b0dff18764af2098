"""What the operator wrote: the configuration file, checked as a whole before anything starts."""

from dp_extproc.config.envoy import BodyMode, CutStreams, EnvoySettings
from dp_extproc.config.listen import ListenSettings, SocketAddress
from dp_extproc.config.load import LoadSettings, LoadSignal, LoadSource
from dp_extproc.config.loader import ConfigError, Problem, load_config, parse_config, read_config
from dp_extproc.config.pools import ClientRanks, EndpointConfig, HostPolicy, PolicySettings, PoolConfig, RankPolicy
from dp_extproc.config.reliability import (
    AdmissionSettings,
    HealthSettings,
    QueueSettings,
    RetrySettings,
    Supervise,
    SupervisionSettings,
)
from dp_extproc.config.schema import Config, Protocol, Reload
from dp_extproc.config.security import ApiKeySource, ServerTls, ServiceTls
from dp_extproc.config.sync import SyncSettings

__all__ = [
    "AdmissionSettings",
    "ApiKeySource",
    "BodyMode",
    "ClientRanks",
    "Config",
    "ConfigError",
    "CutStreams",
    "EndpointConfig",
    "EnvoySettings",
    "HealthSettings",
    "HostPolicy",
    "ListenSettings",
    "LoadSettings",
    "LoadSignal",
    "LoadSource",
    "PolicySettings",
    "PoolConfig",
    "Problem",
    "Protocol",
    "QueueSettings",
    "RankPolicy",
    "Reload",
    "RetrySettings",
    "ServerTls",
    "ServiceTls",
    "SocketAddress",
    "Supervise",
    "SupervisionSettings",
    "SyncSettings",
    "load_config",
    "parse_config",
    "read_config",
]
