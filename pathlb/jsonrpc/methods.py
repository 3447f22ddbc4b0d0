"""What each JSON-RPC method allows: which may be sent twice, which only once, which to one instance alone."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType

from .calls import read_call
from .text import is_array, parse, parse_elements


class Safety(enum.Enum):
    """What may be done with a call whose fate is unknown, and where it can go at all."""

    READ = "read"
    """Changes nothing: it may be sent twice, and to any instance."""
    WRITE = "write"
    """It, or nobody knows what it does: sent again only when it provably reached no instance."""
    FILTER = "filter"
    """Belongs to the instance that made the filter, and takes from it: never sent to another, never sent twice."""


_READ, _WRITE, _FILTER = Safety.READ, Safety.WRITE, Safety.FILTER

# From the execution APIs of Ethereum, the documentation of geth, Erigon, Nethermind, Besu, Reth, OP Stack, Arbitrum and
# Polygon, and the API references of the other chains. Writes need a line only where a pattern would take them for
# reads; the others are named so that no broader pattern in a table of the user's turns them into one by accident.
_TABLE: tuple[tuple[Safety, str], ...] = (
    # EVM chains
    (_READ, "eth_accounts eth_baseFee eth_blobBaseFee eth_blockNumber eth_call* eth_chainId eth_coinbase"),
    (_READ, "eth_config eth_createAccessList eth_estimate* eth_feeHistory eth_gasPrice eth_get* eth_hashrate"),
    (_READ, "eth_maxPriorityFeePerGas eth_mining eth_protocolVersion eth_simulate* eth_syncing"),
    (_FILTER, "eth_getFilterChanges eth_getFilterLogs eth_uninstallFilter"),
    (_WRITE, "eth_new* eth_send* eth_submit* eth_sign* eth_resend eth_cancel* eth_subscribe eth_unsubscribe"),
    (_READ, "net_* web3_* rpc_modules trace_* debug_trace* debug_get* debug_storageRangeAt"),
    (_READ, "txpool_content* txpool_inspect txpool_status txpool_besu*"),
    (_READ, "erigon_get* erigon_blockNumber ots_* bor_get* zks_get* zks_estimate* optimism_* rollup_* arb_get*"),
    (_WRITE, "personal_* admin_* miner_* engine_* debug_set* parity_set* hardhat_* evm_* anvil_*"),
    # Solana, Stellar
    (_READ, "get* isBlockhashValid minimumLedgerSlot simulateTransaction"),
    (_WRITE, "sendTransaction requestAirdrop"),
    # Bitcoin and its relatives; what hands out a new address, or takes work, is a write by the name of a read
    (_READ, "decoderawtransaction decodescript estimatesmartfee testmempoolaccept validateaddress verifymessage"),
    (_WRITE, "send* getnew* getrawchangeaddress getaccountaddress getauxblock getwork* submit* generate* import*"),
    # Cosmos, CometBFT
    (_READ, "abci_info abci_query block block_by_hash block_results block_search blockchain check_tx consensus_params"),
    (_READ, "consensus_state dump_consensus_state genesis genesis_chunked header header_by_hash health net_info"),
    (_READ, "num_unconfirmed_txs status tx tx_search unconfirmed_txs validators"),
    (_WRITE, "broadcast_* unsafe_* dial_*"),
    # NEAR
    (_READ, "chunk gas_price light_client_proof network_info next_light_client_block query EXPERIMENTAL_changes*"),
    (_READ, "EXPERIMENTAL_genesis_config EXPERIMENTAL_protocol_config EXPERIMENTAL_receipt EXPERIMENTAL_tx_status"),
    (_WRITE, "send_tx EXPERIMENTAL_broadcast*"),
    # Sui
    (_READ, "sui_get* sui_multiGet* sui_tryGet* sui_tryMultiGet* sui_dryRun* sui_devInspect* suix_get* suix_query*"),
    (_READ, "suix_resolve*"),
    (_WRITE, "sui_execute*"),
    # Substrate
    (_READ, "chain_get* state_call state_get* state_query* payment_query* rpc_methods system_accountNextIndex"),
    (_READ, "system_chain* system_health system_name system_nodeRoles system_peers system_properties system_syncState"),
    (_READ, "system_version"),
    (_WRITE, "author_* system_add* system_remove* system_reset* offchain_*"),
    # Starknet
    (_READ, "starknet_blockHashAndNumber starknet_blockNumber starknet_call starknet_chainId starknet_estimate*"),
    (_READ, "starknet_get* starknet_simulate* starknet_specVersion starknet_syncing starknet_trace*"),
    (_WRITE, "starknet_add*"),
    # XRP Ledger
    (_READ, "account_channels account_currencies account_info account_lines account_nfts account_objects"),
    (_READ, "account_offers account_tx amm_info book_offers fee ledger ledger_closed ledger_current ledger_data"),
    (_READ, "ledger_entry nft_buy_offers nft_sell_offers ripple_path_find server_info server_state transaction_entry"),
    (_WRITE, "sign sign_for ledger_accept"),
    # Avalanche
    (_READ, "avax.get* avm.get* info.get* info.is* platform.get* platform.validates platform.validatedBy"),
    (_WRITE, "avax.issueTx avm.issueTx platform.issueTx"),
)

DEFAULT_METHODS: Mapping[str, Safety] = MappingProxyType(
    {pattern: safety for safety, patterns in _TABLE for pattern in patterns.split()}
)
"""Pattern to safety: a method's name, or how it begins, with a `*` at the end."""


class MethodRules:
    """The table of methods: the defaults, and `extra`, which may replace them and add to them.

    A key is the name of a method, or how it begins, with a `*` at the end. The exact name decides, else the longest
    beginning, whichever table it is from. A method that is in neither table is a write: a read taken for a write costs
    a retry that could have been, a write taken for a read is done twice. To have the methods of another chain sent
    again, add them: `{"mychain_get*": Safety.READ}`.
    """

    def __init__(self, extra: Mapping[str, Safety]) -> None:
        table = {**DEFAULT_METHODS, **extra}
        self._exact = {name: safety for name, safety in table.items() if not name.endswith("*")}
        self._beginnings = {name[:-1]: safety for name, safety in table.items() if name.endswith("*")}
        self._lengths = sorted({len(beginning) for beginning in self._beginnings}, reverse=True)

    def safety(self, method: str) -> Safety:
        """What is known of a method; `Safety.WRITE` if nothing is. Names differ in upper and lower case."""
        found = self._exact.get(method)
        if found is None:
            for length in self._lengths:
                found = self._beginnings.get(method[:length])
                if found is not None:
                    return found
            return Safety.WRITE
        return found

    def may_send_twice(self, body: bytes) -> bool:
        """Whether a request body is a JSON-RPC call that only reads, or a batch of such calls and nothing else.

        Anything that is not, or that two servers may read in two ways, is not: bad JSON, an empty batch, two members
        called `method`, or one called `Method`. Raises nothing.
        """
        try:
            values = [element.value for element in parse_elements(body)] if is_array(body) else [parse(body)]
            methods = {read_call(value).method for value in values}
        except ValueError:
            return False
        return bool(methods) and all(self.safety(method) is Safety.READ for method in methods)
