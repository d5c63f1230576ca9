"""The error tree of tilewise.

    TilewiseError
    ├── ProblemError          a Problem that cannot exist, or a key that does not parse
    ├── ConfigError           a Config outside its SearchSpace, or of an unknown kernel
    ├── InputError            tensors or arguments that do not fit together
    ├── UnsupportedError      a backend that cannot compute this problem on this device
    ├── DeviceError           a device that does not exist or cannot be read
    ├── SnapshotError         a snapshot that is damaged, of another schema, or missing
    ├── SourceError           a source of answers that cannot be reached or makes no sense
    │   └── RefusedError          it wants another token
    ├── DatabaseError         a database that cannot be used
    │   └── SchemaVersionError    older or newer than this code expects
    ├── AgreementError        another rank of the process group failed, or does something else
    ├── TuningError           a search that cannot start or has no valid candidate
    ├── NotFoundError         a job, snapshot, channel or token that does not exist
    ├── ConflictError         something changed since it was read, or its state does not allow this
    └── SettingsError         a setting (argument or TILEWISE_* variable) that makes no sense

Every message says what was expected, what came, and what to do.
"""


class TilewiseError(Exception):
    """Base of every error tilewise raises on purpose."""


class ProblemError(TilewiseError, ValueError):
    """The description of an attention problem is impossible or does not parse."""


class ConfigError(TilewiseError, ValueError):
    """A config lies outside its search space or names an unknown kernel."""


class InputError(TilewiseError, ValueError):
    """Tensors or arguments do not fit together; raised before anything is launched."""


class UnsupportedError(TilewiseError):
    """A backend cannot compute the problem on this device."""


class DeviceError(TilewiseError):
    """The device does not exist or its properties cannot be read."""


class SnapshotError(TilewiseError):
    """A snapshot is damaged, of an unknown schema, or missing."""


class SourceError(TilewiseError):
    """A source of answers cannot be reached or answers nonsense."""


class RefusedError(SourceError):
    """The source of answers refuses the token, or wants one."""


class DatabaseError(TilewiseError):
    """The database cannot be opened, read or written."""


class SchemaVersionError(DatabaseError):
    """The database schema is older or newer than this code expects."""


class AgreementError(TilewiseError):
    """Another rank of the process group failed in a collective call, or was given something else."""


class TuningError(TilewiseError):
    """A search cannot start, or ended without a single valid candidate."""


class NotFoundError(TilewiseError):
    """What was named does not exist."""


class ConflictError(TilewiseError):
    """It changed since it was read, or the state it is in does not allow what was asked."""


class SettingsError(TilewiseError, ValueError):
    """A setting, given as an argument or a TILEWISE_* variable, makes no sense."""
