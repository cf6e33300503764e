"""From pairs in any form to a training: what is chosen for their number and for the machine, and why."""

from mmssl.apps.autoconfig.choose import Choice, choose
from mmssl.apps.autoconfig.inputs import Machine, Pairs, Start

__all__ = ["Choice", "Machine", "Pairs", "Start", "choose"]
