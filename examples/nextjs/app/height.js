const CALL = JSON.stringify({ jsonrpc: '2.0', id: 1, method: 'eth_blockNumber', params: [] })

/** The height of the chain, from the gateways, at every call. Node's fetch keeps its connections. */
export async function readHeight() {
  const response = await fetch(`${process.env.LOCAL_GATEWAY_URL}/v1`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json', 'Target-Service-Id': 'eth' },
    body: CALL,
    cache: 'no-store',
  })
  if (!response.ok) throw new Error(`the gateway answered ${response.status}: ${await response.text()}`)
  const { result, error } = await response.json()
  if (error) throw new Error(`the gateway answered error ${error.code}: ${error.message}`)
  return Number(result)
}
