"""The configuration file as typed data, checked as a whole before anything starts."""

from dp_extproc.config.envoy import BodyMode, EnvoySettings, TruncatedStreams
from dp_extproc.config.listen import ListenSettings, SocketAddress
from dp_extproc.config.load import LoadSettings, LoadSignal, LoadSource
from dp_extproc.config.loader import Warn, ignore, parse_config
from dp_extproc.config.picker import PickerSettings, PrefillLeg
from dp_extproc.config.pools import HostPolicy, PolicySettings, PoolConfig, RankPolicy
from dp_extproc.config.problems import ConfigError, Problem
from dp_extproc.config.reliability import AdmissionSettings, RetrySettings, Supervise, SupervisionSettings
from dp_extproc.config.schema import Config, Protocol, Reload
from dp_extproc.config.security import ApiKeySource, EngineTls, ServerTls, ServiceTls
from dp_extproc.config.source import ConfigFile, ConfigSource, FixedText
from dp_extproc.config.sync import SyncSettings
from dp_extproc.config.without_file import Given, WithoutFile, configure

__all__ = [
    "AdmissionSettings", "ApiKeySource", "BodyMode", "Config", "ConfigError", "ConfigFile", "ConfigSource",
    "EngineTls", "EnvoySettings", "FixedText", "Given", "HostPolicy", "ListenSettings", "LoadSettings", "LoadSignal",
    "LoadSource", "PickerSettings", "PolicySettings", "PoolConfig", "PrefillLeg", "Problem", "Protocol", "RankPolicy",
    "Reload", "RetrySettings", "ServerTls", "ServiceTls", "SocketAddress", "Supervise", "SupervisionSettings",
    "SyncSettings", "TruncatedStreams", "Warn", "WithoutFile", "configure", "ignore", "parse_config",
]  # fmt: skip
