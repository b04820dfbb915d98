"""
What can go wrong, sorted by what the caller does next:

* FarmError
  + UsageError      what was typed or configured: correct it and call again (exit 2)
  + DataError       this sample or file: name it, leave it out, go on
  + DeviceError     this device: another one takes the shard
    - DeviceCrashed   the device process ended by itself
    - DeviceHung      the device process was killed at its deadline
  + HostError       this host lacks what the job needs: other hosts do it
  + JobError        no device can do it: fail the job with the text
  + StorageError    the database or the disk: nothing was written, try again later
    - InvariantBroken  what must never happen has: stop and look

Every message names the thing, what was expected, what was found and what to do next.
"""


class FarmError(Exception):
    """Something the farm can put in a sentence; a user sees the sentence, never a traceback."""

    exit_code = 1


class UsageError(FarmError):
    """What was asked cannot be asked like this."""

    exit_code = 2


class DataError(FarmError):
    """A sample, label, bin or image that cannot be used. The others can."""


class DeviceError(FarmError):
    """A device failed at something another device may well do."""


class DeviceCrashed(DeviceError):
    """The device process ended by itself while a batch was on the device."""


class DeviceHung(DeviceError):
    """The device process did not answer within a batch's deadline and was killed."""


class HostError(FarmError):
    """This host cannot do the job: bins, artifact or what its backend needs are missing, or not as they must be."""


class JobError(FarmError):
    """The job cannot run on any device: a model that does not load, no memory at this batch size."""


class StorageError(FarmError):
    """The database could not be used. Nothing was half written."""


class InvariantBroken(StorageError):
    """The database holds, or was about to hold, what the design rules out."""
