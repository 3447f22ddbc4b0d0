import { readHeight } from './height.js'

export const dynamic = 'force-dynamic' // rendered when it is asked for: the build has no gateway

export default async function Page() {
  return <h1>{`Block ${await readHeight()}`}</h1>
}
