"""Dollars and joules of a run: what its devices, hosts and memories cost and draw, and whose requests that was for.

After the metrics, from the records: `used` says once what was held and how busy it was, as plain data; `cost` and
`energy` are functions of that and of prices, so that a run is priced anew without running again. It never runs
anything and opens no file.
"""

from mist.cost.bill import cost
from mist.cost.busy import BusyTime, Holding
from mist.cost.energy import EnergySettings, energy
from mist.cost.prices import PURCHASES, ClientPrice, DevicePrice, PriceList, Tariff
from mist.cost.usage import HostUse, MemoryUse, used

__all__ = [
    "PURCHASES", "BusyTime", "ClientPrice", "DevicePrice", "EnergySettings", "Holding", "HostUse", "MemoryUse",
    "PriceList", "Tariff", "cost", "energy", "used",
]  # fmt: skip
